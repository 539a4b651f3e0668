"""What a site's owner lets its site do, whatever a coordinator asks, and how its worker is told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


class Refusal(ValueError):
    """A task that this site does not do; its message says why, and goes to the coordinator."""


@dataclass(frozen=True)
class Consent:
    """What this site accepts, and what of its own it uses.

    Attributes:
        data: The site's examples, JSON Lines.
        model: The base model on this machine; empty = only one that ships with the package.
        methods: Methods that it takes part in, those of one's own by name; empty = all that come
            with Orchard.
        budget: Experts that it trains, as ``client.budget``; empty = as the recipe says.
        memory: Bytes that training may take, as ``client.memory_bytes``; empty = not limited.
        calibration: Its own file for ``strategy.calibration = corpus``.
        retention: Its own file for ``evaluation.retention_path``.
    """

    data: str
    model: str = ""
    methods: tuple[str, ...] = ()
    budget: str = ""
    memory: str = ""
    calibration: str = ""
    retention: str = ""


@dataclass(frozen=True)
class SiteSettings:
    """What a worker is started with.

    Attributes:
        name: Of the site.
        store: Its folder: personal tensors and the audit log.
        socket: Where it listens.
        consent: What its owner lets it do.
    """

    name: str
    store: Path
    socket: Path
    consent: Consent

    def to_json(self) -> str:
        """Return these settings as text."""
        values = {"name": self.name, "store": str(self.store), "socket": str(self.socket)}
        return json.dumps({**values, "consent": asdict(self.consent)})

    @staticmethod
    def from_json(text: str) -> SiteSettings:
        """Read settings."""
        values = json.loads(text)
        consent = values["consent"]
        return SiteSettings(
            values["name"],
            Path(values["store"]),
            Path(values["socket"]),
            Consent(**{**consent, "methods": tuple(consent["methods"])}),
        )
