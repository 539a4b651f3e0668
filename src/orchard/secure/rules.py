"""What every member of a secure sum holds the coordinator to, and what it says to the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass


class BrokenRuleError(ValueError):
    """Somebody asked a member for what would show an update, or said what cannot be."""


@dataclass(frozen=True)
class Rules:
    """When a member takes part.

    Attributes:
        least: It is never one of fewer members than this.
        threshold: So many members must answer to the end; as many shares give a secret back. More
            than two thirds of the members, so that a coordinator who tells two groups different
            things cannot have both a member's own mask and its key.
    """

    least: int
    threshold: int

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


def survivors_statement(session: bytes, names: Iterable[str]) -> bytes:
    """Return what a member signs of whose vectors are in the sum."""
    return _statement(session, "survivors", sorted(names))


def commitment(seed: bytes) -> bytes:
    """Return the digest by which a seed is known again."""
    return hashlib.sha256(b"own mask" + seed).digest()


def point_of(name: str, names: Iterable[str]) -> int:
    """Return where a member's share of a secret lies: its place among all, from 1."""
    return sorted(names).index(name) + 1


def _statement(session: bytes, kind: str, parts: list[str]) -> bytes:
    return json.dumps([session.hex(), kind, parts]).encode()
