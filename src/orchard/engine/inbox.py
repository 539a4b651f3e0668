"""Updates that were let in, on disk until they are aggregated, so that a crash loses none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchard.communication.audit import content_digest
from orchard.communication.messages import read_update_header
from orchard.results import write_atomically


@dataclass(frozen=True)
class Arrived:
    """One update's message.

    Attributes:
        client_id: Whose.
        round_number: Which round's task it answers.
        path: Where it lies.
        num_bytes: Its length.
    """

    client_id: str
    round_number: int
    path: Path
    num_bytes: int


@dataclass(frozen=True)
class Inbox:
    """A folder of updates.

    Attributes:
        folder: Its path; it need not exist yet.
    """

    folder: Path

    def put(self, client_id: str, round_number: int, message: bytes) -> Arrived:
        """Keep an update; when this returns it is on disk."""
        path = self.folder / f"round_{round_number:06d}_{content_digest(message)[:16]}"
        write_atomically(path, message)
        return Arrived(client_id, round_number, path, len(message))

    def take_up(self, clients: Collection[str], *, round_number: int) -> list[Arrived]:
        """Return the updates for a round that came before a crash, and throw the others away."""
        arrived = []
        for path in sorted(self.folder.glob("round_*")):
            message = path.read_bytes()
            header = read_update_header(message)
            client_id = header.client_id
            if header.round_number == round_number and client_id in clients:
                arrived.append(Arrived(client_id, round_number, path, len(message)))
            else:
                path.unlink()
        return arrived

    def throw_away(self, arrived: Sequence[Arrived]) -> None:
        """Delete updates that a checkpoint has in it."""
        for own in arrived:
            own.path.unlink(missing_ok=True)
