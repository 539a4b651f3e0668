"""What a site's owner lets its site do, whatever a coordinator asks, and how its worker is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from orchard.communication.refusals import Code

DRY_RUN_FILE = "dry_run.txt"
"""Of a site's store: what its worker writes where it only looks."""


class Refusal(ValueError):
    """A task that this site does not do.

    The coordinator is told the code and the option. The message is for the site's own log and
    audit: it may hold values of the data, and paths.

    Attributes:
        code: Why.
        option: Of the recipe or of the site's command; empty = none.
    """

    def __init__(self, code: Code, message: str, *, option: str = "") -> None:
        """Refuse with a code for the coordinator and a message for the owner."""
        super().__init__(message)
        self.code, self.option = code, option


@dataclass(frozen=True)
class Consent:
    """What this site accepts, and what of its own it uses.

    Attributes:
        data: The site's examples, JSON Lines.
        model: The base model on this machine; empty = only one that ships with the package.
        methods: Methods that it takes part in, those of one's own by name; empty = all that come
            with Orchard.
        budget: Experts that it trains at a time, as ``client.budget``; empty = as the recipe says.
        memory: Bytes that training may take, as ``client.memory_bytes``; empty = not limited.
        calibration: Its own file for ``strategy.calibration = corpus``.
        retention: Its own file for ``evaluation.retention_path``.
        data_recipe: Its own TOML file with the data section; empty = as the first recipe that it
            joins says, and no other afterwards.
        min_test: Fewest rows that a measure may be over, and fewest rows for training, in
            each round too.
        decimals: Digits after the point of every measure that leaves.
        trees_per_round: How many different global trees it measures or trains in one round.
        runs_per_day: How many runs that it does not know yet it joins in 24 hours.
        requests_per_hour: How often it is asked to join or to do something, in an hour.
        keeps_answers: Whether answers that are generated over its rows may be kept in its store,
            where the recipe asks for it.
        limits: Largest values of options, beside or in the place of ``limits.LIMITS``.
        secure_least: Its updates leave in secure sums of at least so many sites alone; 0 = as the
            recipe says.
        peers: Folder of the public keys of the sites that it sums with; empty = it sums with none.
        signing_key: Its own private key, by which those know it; empty = none.
        epsilon: Most that its updates may cost its rows over all runs, and then nothing else of
            rows leaves; 0 = as recipes say.
        delta: Probability with which that may not hold.
    """

    data: str
    model: str = ""
    methods: tuple[str, ...] = ()
    budget: str = ""
    memory: str = ""
    calibration: str = ""
    retention: str = ""
    data_recipe: str = ""
    min_test: int = 20
    decimals: int = 4
    trees_per_round: int = 2
    runs_per_day: int = 20
    requests_per_hour: int = 3600
    keeps_answers: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)
    secure_least: int = 0
    peers: str = ""
    signing_key: str = ""
    epsilon: float = 0.0
    delta: float = 1e-5

    def digest(self) -> str:
        """Return what changes when the owner's consent does, the files that it names too."""
        own = Path(self.data_recipe).read_bytes() if self.data_recipe else b""
        if self.peers:
            for path in sorted(Path(self.peers).glob("*.pub")):
                own += path.name.encode() + b"\0" + path.read_bytes()
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode() + hashlib.sha256(own).digest()).hexdigest()


@dataclass(frozen=True)
class SiteSettings:
    """What a worker is started with.

    Attributes:
        name: Of the site.
        store: Its folder: personal tensors and the audit log.
        socket: Where it listens.
        consent: What its owner lets it do.
        only_looks: Whether it joins nothing, and writes down what is asked of it.
    """

    name: str
    store: Path
    socket: Path
    consent: Consent
    only_looks: bool = False

    def to_json(self) -> str:
        """Return these settings as text."""
        values = {"name": self.name, "store": str(self.store), "socket": str(self.socket)}
        own = {"consent": asdict(self.consent), "only_looks": self.only_looks}
        return json.dumps({**values, **own})

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
            values["only_looks"],
        )
