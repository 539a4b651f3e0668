"""Where personal tensors live between rounds: on the client's own disk, and nowhere else.

Every round that a client trains writes one file, whole or not at all. A file is bound to the
digest of the base it was trained on, to its round and its place, and carries its own checksum: one
that changed, was cut off or came from elsewhere is an error that names it, never a start from
something older. A round that is run again, because the server did not complete it, starts from the
version before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from orchard.results import write_atomically
from orchard.trees import Tree

DAMAGED = "damaged"
_FILES = "round_[0-9]*.safetensors"
_FAR = 8  # rounds without a version, after which the one before them is kept for longer
_CHECKSUM = b'\\"sha256\\": \\"'  # as it stands in the file, JSON within JSON
_NONE = b"0" * 64


class DamagedError(ValueError):
    """A file is not what the client wrote.

    Attributes:
        path: Which one.
    """

    def __init__(self, path: Path, why: str) -> None:
        """Name the file and what is wrong with it."""
        super().__init__(
            f"{path} must be as this client wrote it, got {why}; bring it back from a copy, or set "
            "it aside to go on from the version before it"
        )
        self.path = path


class OtherBaseError(ValueError):
    """Personal tensors belong to another base model."""


@dataclass(frozen=True)
class Personal:
    """Tensors that never leave a client: deliberately no mapping, so no update can hold one.

    Attributes:
        tensors: Name to tensor, on the CPU.
    """

    tensors: Tree


@dataclass(frozen=True)
class ClientStore:
    """One client's folder.

    Attributes:
        folder: Its path; it need not exist yet.
        base_digest: SHA-256 of the base model's tensors.
        place: What it holds of whom; empty = the name of its folder.
        keep_rounds: So many versions before the newest stay, and two at least.
    """

    folder: Path
    base_digest: str
    place: str = ""
    keep_rounds: int = 0

    def beside(self, name: str) -> ClientStore:
        """Return a store of other things of this client, in a folder below this one."""
        place = f"{self.place or self.folder.name}/{name}"
        return replace(self, folder=self.folder / name, place=place, keep_rounds=0)

    def _versions(self) -> dict[int, Path]:
        return {_round_of(path): path for path in self.folder.glob(_FILES)}

    def rounds(self) -> list[int]:
        """Return the rounds of which there is a version, in order."""
        return sorted(self._versions())

    def load(self, *, before_round: int) -> Personal | None:
        """Return the newest version that an earlier round wrote, or None where there is none.

        Raises:
            DamagedError: It is not as this client wrote it.
            OtherBaseError: It belongs to another base model.
        """
        earlier = [number for number in self._versions() if number < before_round]
        return self._read(max(earlier)) if earlier else None

    def _read(self, round_number: int) -> Personal:
        path = self._versions()[round_number]
        content = path.read_bytes()
        start = content.find(_CHECKSUM) + len(_CHECKSUM)
        if start < len(_CHECKSUM) or len(content) < start + len(_NONE):
            raise DamagedError(path, "a file without a checksum")
        end = start + len(_NONE)
        if _digest(content, start, end) != content[start:end]:
            raise DamagedError(path, "another checksum")
        try:
            header: dict[str, Any] = json.loads(_metadata(content)["orchard"])
            tensors = load(content)
        except (ValueError, KeyError, SafetensorError) as error:
            raise DamagedError(path, "a file that does not decode") from error
        if (header["place"], header["round_number"]) != (self._place, round_number):
            raise DamagedError(
                path, f"what was written for round {header['round_number']} of {header['place']}"
            )
        base = header["base_digest"]
        if base != self.base_digest:
            raise OtherBaseError(
                f"personal tensors of {self.folder.name} must belong to this base model, got "
                f"base {base[:12]} instead of {self.base_digest[:12]}; "
                "use the model they were trained on, or another --out"
            )
        return Personal(tensors)

    @property
    def _place(self) -> str:
        return self.place or self.folder.name

    def save(self, personal: Personal, *, round_number: int) -> None:
        """Write what the client keeps after ``round_number``.

        The two versions before it stay, or ``keep_rounds``: the server keeps two checkpoints, and
        may have to go back to the older one. What is older goes, but for the last version before a
        long gap: whoever asks for a round far ahead does not make a client lose where it was.
        """
        versions = self._versions()
        earlier = [number for number in versions if number < round_number]
        kept = _to_keep(earlier, round_number, num_last=max(2, self.keep_rounds))
        for number in sorted(versions):
            if number < round_number and number not in kept:
                versions[number].unlink()
        header = {
            "base_digest": self.base_digest,
            "round_number": round_number,
            "place": self._place,
            "sha256": _NONE.decode(),
        }
        tensors = {name: tensor.contiguous() for name, tensor in personal.tensors.items()}
        content = bytearray(save(tensors, metadata={"orchard": json.dumps(header)}))
        start = content.index(_CHECKSUM) + len(_CHECKSUM)
        end = start + len(_NONE)
        content[start:end] = _digest(content, start, end)
        write_atomically(self.folder / f"round_{round_number:06d}.safetensors", content)


def set_aside(error: DamagedError) -> int | None:
    """Move a damaged file out of the way, and return the round of the version before it.

    It stays on the disk, for its owner to look at. None where no earlier version is left.
    """
    number, folder = _round_of(error.path), error.path.parent
    (folder / DAMAGED).mkdir(exist_ok=True, mode=0o700)
    os.replace(error.path, folder / DAMAGED / error.path.name)
    earlier = [_round_of(path) for path in folder.glob(_FILES)]
    return max((other for other in earlier if other < number), default=None)


def _round_of(path: Path) -> int:
    return int(path.stem.partition("_")[2])


def _digest(content: bytes | bytearray, start: int, end: int) -> bytes:
    """Return the checksum of a file in which its own place is empty, as hexadecimal digits."""
    view = memoryview(content)
    found = hashlib.sha256(view[:start])
    found.update(_NONE)
    found.update(view[end:])
    return found.hexdigest().encode()


def _metadata(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return found


def _to_keep(numbers: Sequence[int], newest: int, *, num_last: int) -> set[int]:
    """Return which earlier versions stay beside the newest one.

    The last ``num_last``; and of those before a gap of more than ``_FAR`` rounds, for each doubling
    of the distance, the oldest and the newest, so that they are few however many rounds there are.
    """
    ordered = sorted(numbers)
    before_gaps: dict[int, list[int]] = {}
    for number, following in zip(ordered, [*ordered, newest][1:], strict=True):
        if following - number > _FAR:
            before_gaps.setdefault((newest - number).bit_length(), []).append(number)
    ends = {end for group in before_gaps.values() for end in (group[0], group[-1])}
    return {*ordered[-num_last:], *ends}
