"""Updates that were let in, on disk until they are aggregated, so that a crash loses none.

One that brought the aggregation down is moved to the quarantine, with the reason beside it: its
owner can look at it, and no restart meets it again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchard.communication.audit import content_digest
from orchard.communication.messages import read_update_header
from orchard.results import write_atomically, write_json

log = logging.getLogger(__name__)

MAX_QUARANTINE_BYTES = 1 << 30
"""What the quarantine keeps of messages; the oldest go first."""
MAX_QUARANTINE_REASONS = 10_000
"""How many reasons it keeps, and all of the round that is on."""


@dataclass(frozen=True)
class Arrived:
    """One update's message.

    Attributes:
        client_id: Whose.
        round_number: Which round's task it answers.
        path: Where it lies.
        num_bytes: Its length.
        norm: L2 norm of the update.
        weight: The largest that it gives a name.
        preference: The largest that it gives a router, where routers count by preference.
        share: For how much of its weight it counts beside the others of its round.
        num_values: How many values it has once it is decoded.
    """

    client_id: str
    round_number: int
    path: Path
    num_bytes: int
    norm: float = 0.0
    weight: float = 0.0
    preference: float = 0.0
    share: float = 1.0
    num_values: int = 0

    def weighed(
        self, norm: float, weight: float, preference: float = 0.0, *, num_values: int = 0
    ) -> Arrived:
        """Return it with what was found in it."""
        return replace(self, norm=norm, weight=weight, preference=preference, num_values=num_values)


def likeliest(arrived: Sequence[Arrived]) -> list[Arrived]:
    """Return updates, the likeliest first to bring down what they are combined in.

    Where only all of them together do, whichever is left out seems to be the cause. It is the one
    that takes most memory, so that nobody is blamed for less than another one sent; among equals,
    the one that pulls most.
    """
    return sorted(arrived, key=lambda own: (-own.num_values, -own.norm * max(own.weight, 1.0)))


@dataclass(frozen=True)
class Inbox:
    """A folder of updates.

    Attributes:
        folder: Its path; it need not exist yet. The quarantine is beside it.
        max_quarantine_bytes: Of messages that the quarantine keeps; the oldest go first.
        max_quarantine_reasons: How many reasons it keeps, and all of the round that is on.
    """

    folder: Path
    max_quarantine_bytes: int = MAX_QUARANTINE_BYTES
    max_quarantine_reasons: int = MAX_QUARANTINE_REASONS

    @property
    def quarantine(self) -> Path:
        """Where updates lie that must not be aggregated."""
        return self.folder.with_name("quarantine")

    def put(self, client_id: str, round_number: int, message: bytes) -> Arrived:
        """Keep an update; when this returns it is on disk."""
        path = self.folder / f"round_{round_number:06d}_{content_digest(message)[:16]}"
        write_atomically(path, message)
        return Arrived(client_id, round_number, path, len(message))

    def take_up(
        self,
        clients: Collection[str],
        *,
        round_number: int,
        look: Callable[[bytes, Arrived], Arrived] = lambda message, own: own,
        refuse: Callable[[Arrived, Exception], None] = lambda own, error: None,
    ) -> list[Arrived]:
        """Return the updates for a round that came before a crash, and throw the others away.

        Args:
            clients: Whose updates count.
            round_number: Which round's do.
            look: Checks a message again, as when it came.
            refuse: Told of one that does not pass, which goes to the quarantine.
        """
        arrived = []
        for path in sorted(self.folder.glob("round_*")):
            message = path.read_bytes()
            own = Arrived("", round_number, path, len(message))
            try:
                header = read_update_header(message)
                own = replace(own, client_id=header.client_id, round_number=header.round_number)
                if header.round_number != round_number or header.client_id not in clients:
                    path.unlink()
                    continue
                arrived.append(look(message, own))
            except ValueError as error:
                refuse(own, error)
        return arrived

    def throw_away(self, arrived: Sequence[Arrived]) -> None:
        """Delete updates that a checkpoint has in it, or that do not count."""
        for own in arrived:
            own.path.unlink(missing_ok=True)

    def set_apart(self, own: Arrived, reason: str) -> None:
        """Move an update to the quarantine, with the reason."""
        self.quarantine.mkdir(parents=True, exist_ok=True)
        about = {"site": own.client_id, "round": own.round_number, "reason": reason}
        write_json(self.quarantine / f"{own.path.name}.json", about)
        if own.path.exists():
            os.replace(own.path, self.quarantine / own.path.name)
        kept = [path for path in self.quarantine.glob("round_*") if path.suffix != ".json"]
        sizes = {path: path.stat().st_size for path in sorted(kept)}  # by round
        while sum(sizes.values()) > self.max_quarantine_bytes:
            oldest = next(iter(sizes))
            del sizes[oldest]
            log.warning("the quarantine is full; its oldest message goes: %s", oldest.name)
            oldest.unlink(missing_ok=True)
        reasons = sorted(self.quarantine.glob("round_*.json"))
        newest = reasons[-1].name.rpartition("_")[0]  # whose reasons say who is not asked again
        for path in reasons[: -self.max_quarantine_reasons]:
            if not path.name.startswith(newest):
                log.warning("the quarantine is full; its oldest reason goes: %s", path.name)
                path.unlink(missing_ok=True)

    def num_set_apart(self) -> int:
        """Return how many reasons the quarantine has."""
        return len(list(self.quarantine.glob("round_*.json")))

    def set_apart_in(self, round_number: int) -> frozenset[str]:
        """Return whose updates of a round are in the quarantine; they are not asked for again."""
        found = self.quarantine.glob(f"round_{round_number:06d}_*.json")
        return frozenset(json.loads(path.read_text())["site"] for path in found)
