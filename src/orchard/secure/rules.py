"""What every member of a secure sum holds the coordinator to, and what it says to the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from orchard.secure.fixed_point import Vector


class BrokenRuleError(ValueError):
    """Somebody asked a member for what would show an update, or said what cannot be."""


class MisbehavedError(ValueError):
    """A member said what cannot be; its message says what.

    Attributes:
        name: Who.
    """

    def __init__(self, name: str, message: str) -> None:
        """Lay it at a member's door."""
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Rules:
    """When a member takes part.

    Attributes:
        least: It is never one of fewer members than this.
        threshold: So many members must answer to the end; as many shares give a secret back. More
            than two thirds of the members, so that a coordinator who tells two groups different
            things cannot have both a member's own mask and its key.
        num_neighbors: With how many others each member masks, an even number; 0 = with all. See
            ``graph.py``.
    """

    least: int
    threshold: int
    num_neighbors: int = 0

    def __post_init__(self) -> None:
        """Refuse neighbors that cannot be.

        Raises:
            ValueError: They are an odd number, or fewer than hide a member.
        """
        number = self.num_neighbors
        if number and (number < 2 or number % 2 or number + 1 < self.least):
            raise ValueError(
                f"neighbors must be 0 or an even number of at least {max(self.least - 1, 2)}, got "
                f"{number}; a member hides among them"
            )

    @property
    def fewest(self) -> int:
        """Members without whom there is no sum."""
        return max(self.least, self.threshold)

    def check(self, num_members: int, what: str) -> None:
        """Refuse too few.

        Raises:
            BrokenRuleError: There are fewer than ``fewest``.
        """
        if num_members < self.fewest:
            raise BrokenRuleError(
                f"{what} must be at least {self.fewest} members, got "
                f"{num_members}; the sum of so few would show what one of them sent"
            )


def default_threshold(num_members: int) -> int:
    """Return the smallest threshold above two thirds of the members."""
    return 2 * num_members // 3 + 1


@dataclass(frozen=True)
class Advertisement:
    """How a member begins: public keys of its own for this sum alone, signed.

    Attributes:
        name: Who.
        mask_key: Public key by which two members agree on the mask between them.
        share_key: Public key for what members send each other through the coordinator.
        own_mask: Digest of the seed of its own mask.
        signature: By the member's signing key, of all of it and the session.
    """

    name: str
    mask_key: bytes
    share_key: bytes
    own_mask: bytes
    signature: bytes

    def signed(self, session: bytes) -> bytes:
        """Return what is signed."""
        parts = [self.name, self.mask_key.hex(), self.share_key.hex(), self.own_mask.hex()]
        return _statement(session, "keys", parts)


@dataclass(frozen=True)
class Shared:
    """A member's secrets, in parts for those who hold them.

    Attributes:
        name: Whose.
        sealed: Neighbor to a share of both secrets that only that one can read.
        digests: Holder, itself among them, to the digests of its two shares, by which everybody
            knows them again.
    """

    name: str
    sealed: dict[str, bytes]
    digests: dict[str, tuple[bytes, bytes]]


@dataclass(frozen=True)
class Handed:
    """What one neighbor sealed for a member, as it is passed on.

    Attributes:
        sealed: See ``Shared``.
        digests: Of the two shares in it.
    """

    sealed: bytes
    digests: tuple[bytes, bytes]


@dataclass(frozen=True)
class Masked:
    """A member's vector, under masks.

    Attributes:
        name: Whose.
        vector: Whole numbers, (n,).
        signature: Of who shared their secrets, as this member was told.
        unreadable: Neighbors whose shares were not what they should be.
    """

    name: str
    vector: Vector
    signature: bytes
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Revealed:
    """What a member tells at the end, so that the masks can be taken off the sum.

    Attributes:
        name: Who tells.
        own_masks: Member whose vector is in the sum, to a share of the seed of its own mask.
        mask_keys: Member who left before it sent its vector, to a share of its mask key.
    """

    name: str
    own_masks: dict[str, bytes]
    mask_keys: dict[str, bytes]


def sharing_statement(session: bytes, names: Iterable[str]) -> bytes:
    """Return what a member signs of who shared their secrets when it masked its vector."""
    return _statement(session, "sharing", sorted(names))


def survivors_statement(session: bytes, names: Iterable[str]) -> bytes:
    """Return what a member signs of whose vectors are in the sum."""
    return _statement(session, "survivors", sorted(names))


def commitment(seed: bytes) -> bytes:
    """Return the digest by which a seed is known again."""
    return hashlib.sha256(b"own mask" + seed).digest()


def share_digest(owner: str, holder: str, share: bytes) -> bytes:
    """Return the digest by which one share is known again; of a share nobody can guess."""
    return hashlib.sha256(repr(("share", owner, holder)).encode() + share).digest()


def point_of(name: str, names: Iterable[str]) -> int:
    """Return where a member's share of a secret lies: its place among all, from 1."""
    return sorted(names).index(name) + 1


def _statement(session: bytes, kind: str, parts: list[str]) -> bytes:
    return json.dumps([session.hex(), kind, parts]).encode()
