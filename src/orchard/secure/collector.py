"""The coordinator's side of one secure sum: it passes on, adds, and takes the masks off the sum.

It holds one vector, the sum of what came so far, and never an update without its masks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from orchard.secure.fixed_point import Vector
from orchard.secure.masks import expand, public_of
from orchard.secure.member import add_pair
from orchard.secure.rules import Advertisement, Revealed, Rules, commitment, point_of
from orchard.secure.sharing import join


class TooFewError(ValueError):
    """Too few members are left: the round has no sum, and nothing of it was shown."""


class Collector:
    """One sum."""

    def __init__(self, rules: Rules, session: bytes, length: int) -> None:
        """Begin with nothing.

        Args:
            rules: As the members have them.
            session: Of this sum alone.
            length: Of every vector.
        """
        self._rules, self._session = rules, session
        self._members: dict[str, Advertisement] = {}
        self._sealed: dict[str, Mapping[str, bytes]] = {}
        self._sum: Vector = np.zeros(length, dtype=np.uint32)
        self._survivors: list[str] = []

    def take_advertisements(self, advertised: Mapping[str, Advertisement]) -> None:
        """Note who takes part.

        Raises:
            TooFewError: Fewer than the rules ask for.
        """
        self._check(advertised)
        self._members = dict(advertised)

    def take_shares(self, sealed: Mapping[str, Mapping[str, bytes]]) -> None:
        """Note what members sealed for each other; who did not is out.

        Args:
            sealed: Sender to receiver to what only that one can read.

        Raises:
            TooFewError: Fewer than the rules ask for.
        """
        self._check(sealed)
        self._sealed = dict(sealed)

    def shares_for(self, name: str) -> dict[str, bytes]:
        """Return what the others sealed for a member."""
        return {sender: own[name] for sender, own in self._sealed.items() if sender != name}

    def add(self, name: str, masked: Vector) -> None:
        """Add a member's masked vector to the sum.

        Raises:
            ValueError: It is no member's, comes twice, or has another length.
        """
        if name not in self._sealed or name in self._survivors:
            raise ValueError(f"vectors must come once from each member, got another of {name}")
        if masked.shape != self._sum.shape or masked.dtype != np.uint32:
            raise ValueError(
                f"vector of {name} must be {len(self._sum)} numbers of 32 bits, got "
                f"{masked.shape} of {masked.dtype}"
            )
        self._sum += masked
        self._survivors.append(name)

    def survivors(self) -> list[str]:
        """Return whose vectors are in the sum.

        Raises:
            TooFewError: Fewer than the rules ask for.
        """
        self._check(self._survivors)
        return sorted(self._survivors)

    def unmask(self, revealed: Collection[Revealed]) -> Vector:
        """Take all masks off the sum and return it, (n,).

        Raises:
            TooFewError: Fewer members told their shares than give a secret back.
            ValueError: Shares do not give back what their owner is known by.
        """
        if len(revealed) < self._rules.threshold:
            raise TooFewError(
                f"members who answer to the end must be {self._rules.threshold}, got "
                f"{len(revealed)}; the round is done again"
            )
        total = self._sum.copy()
        gone = sorted(self._sealed.keys() - {*self._survivors})
        for name in self._survivors:
            seed = self._join(name, {own.name: own.own_masks.get(name) for own in revealed})
            if commitment(seed) != self._members[name].own_mask:
                raise ValueError(f"shares of {name} must give back its mask, got another")
            total -= expand(seed, len(total))
        for name in gone:
            key = self._join(name, {own.name: own.mask_keys.get(name) for own in revealed})
            if public_of(key) != self._members[name].mask_key:
                raise ValueError(f"shares of {name} must give back its key, got another")
            for other in self._survivors:
                # What the one who left would have added: the other half of each pair.
                add_pair(
                    total,
                    key,
                    self._members[other].mask_key,
                    self._session,
                    of=name,
                    other=other,
                )
        return total

    def _join(self, owner: str, shares: Mapping[str, bytes | None]) -> bytes:
        found = {point_of(name, self._members): share for name, share in shares.items() if share}
        try:
            return join(found, self._rules.threshold)
        except ValueError as error:
            raise ValueError(f"shares of {owner}: {error}") from error

    def _check(self, members: Collection[str]) -> None:
        if len(members) < self._rules.fewest:
            raise TooFewError(
                f"members must be at least {self._rules.fewest}, got {len(members)}; the round is "
                "done again"
            )
