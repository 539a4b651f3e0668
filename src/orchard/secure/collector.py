"""The coordinator's side of one secure sum: it passes on, adds, and takes the masks off the sum.

It holds one vector, the sum of what came so far, and never an update without its masks. What a
member says that cannot be is laid at that member's door, before it is in anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from orchard.secure.fixed_point import Vector
from orchard.secure.graph import Graph, order_seed
from orchard.secure.masks import check_public, expand, public_of
from orchard.secure.member import add_pair
from orchard.secure.rules import (
    Advertisement,
    Handed,
    Masked,
    MisbehavedError,
    Revealed,
    Rules,
    Shared,
    commitment,
    point_of,
    share_digest,
)
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
        self._shared: dict[str, Shared] = {}
        self._sum: Vector = np.zeros(length, dtype=np.uint32)
        self._signatures: dict[str, bytes] = {}
        self._unreadable: dict[str, set[str]] = {}
        self._revealed: dict[str, Revealed] = {}

    @property
    def length(self) -> int:
        """Of every vector."""
        return len(self._sum)

    def check_advertisement(self, name: str, own: Advertisement) -> None:
        """Refuse keys that cannot be a member's.

        Raises:
            MisbehavedError: They cannot.
        """
        if own.name != name:
            raise MisbehavedError(name, f"keys of {name} must be its own, got those of {own.name}")
        try:
            for key in (own.mask_key, own.share_key):
                check_public(key, of=name)
        except ValueError as error:
            raise MisbehavedError(name, str(error)) from error

    def take_advertisements(self, advertised: Mapping[str, Advertisement]) -> None:
        """Note who takes part.

        Raises:
            TooFewError: Fewer than the rules ask for.
            MisbehavedError: Keys of one cannot be a member's.
        """
        self._check(advertised)
        for name, own in advertised.items():
            self.check_advertisement(name, own)
        self._members = dict(advertised)
        seed = order_seed(self._session, [own.signed(self._session) for own in advertised.values()])
        self.graph = Graph(frozenset(advertised), self._rules.num_neighbors, seed)

    def check_shared(self, name: str, own: Shared) -> None:
        """Refuse shares that are not for a member's own neighbors.

        Raises:
            MisbehavedError: They are of no member, or for others.
        """
        if name not in self._members or own.name != name:
            raise MisbehavedError(name, f"shares must be of members of this sum, got {name}'s")
        if own.sealed.keys() != self.graph.neighbors(name):
            raise MisbehavedError(name, f"shares of {name} must be for its neighbors, got others")
        if own.digests.keys() != self.graph.holders(name):
            raise MisbehavedError(
                name, f"digests of {name} must be of all who hold its shares, got others"
            )

    def take_shares(self, shared: Mapping[str, Shared]) -> None:
        """Note what members sealed for each other; who did not is out.

        Raises:
            TooFewError: Fewer than the rules ask for.
            MisbehavedError: One of them is no member, or sealed something for one who is not.
        """
        for name, own in shared.items():
            self.check_shared(name, own)
        self._check(shared)
        self._shared = dict(shared)

    @property
    def sharing(self) -> list[str]:
        """Who shared secrets."""
        return sorted(self._shared)

    def shares_for(self, name: str) -> dict[str, Handed]:
        """Return what the neighbors sealed for a member."""
        return {
            sender: Handed(own.sealed[name], own.digests[name])
            for sender, own in self._shared.items()
            if name in own.sealed
        }

    def add(self, masked: Masked) -> None:
        """Add a member's masked vector to the sum.

        Raises:
            MisbehavedError: It is no member's, comes twice, or has another length.
        """
        name, vector = masked.name, masked.vector
        if name not in self._shared or name in self._signatures:
            raise MisbehavedError(
                name, f"vectors must come once from each member, got another of {name}"
            )
        if vector.shape != self._sum.shape or vector.dtype != np.uint32:
            raise MisbehavedError(
                name,
                f"vector of {name} must be {len(self._sum)} numbers of 32 bits, got "
                f"{vector.shape} of {vector.dtype}",
            )
        if not self.graph.neighbors(name).issuperset(masked.unreadable):
            raise MisbehavedError(
                name, f"who sent {name} what cannot be read must be its neighbors, got others"
            )
        self._sum += vector
        self._signatures[name] = masked.signature
        for sender in masked.unreadable:
            self._unreadable.setdefault(sender, set()).add(name)

    def lost(self) -> list[str]:
        """Return whose secrets cannot come back, since too few could read their shares."""
        fewest = self.graph.threshold(self._rules)
        return sorted(
            sender
            for sender, readers in self._unreadable.items()
            if sender in self._shared and len(self.graph.holders(sender) - readers) < fewest
        )

    def survivors(self) -> dict[str, bytes]:
        """Return whose vectors are in the sum, with what they signed of who shared secrets.

        Raises:
            TooFewError: Fewer than the rules ask for, or they do not hang together by masks.
        """
        self._check(self._signatures)
        if not self.graph.is_connected(self._signatures):
            raise TooFewError(
                "survivors must hang together by masks, got groups that share none; the round is "
                "done again"
            )
        return dict(sorted(self._signatures.items()))

    def take_revealed(self, own: Revealed) -> None:
        """Note what a member tells at the end.

        Raises:
            MisbehavedError: It tells of others than it holds shares of, or another share than it
                was sent.
        """
        name = own.name
        if name not in self._signatures:
            raise MisbehavedError(name, f"shares must be told by survivors, got {name}'s")
        held = self.graph.holders(name)
        told = ((0, own.own_masks, self._alive()), (1, own.mask_keys, self._gone()))
        for place, shares, of in told:
            for owner, share in shares.items():
                if owner not in held or owner not in of:
                    raise MisbehavedError(
                        name, f"shares that {name} tells must be those it holds, got {owner}'s"
                    )
                if share_digest(owner, name, share) != self._shared[owner].digests[name][place]:
                    raise MisbehavedError(
                        name, f"shares of {owner} must be as they were sent, got another of {name}"
                    )
        self._revealed[name] = own

    def unmask(self, revealed: Collection[Revealed] = ()) -> Vector:
        """Take all masks off the sum and return it, (n,).

        Args:
            revealed: What members tell, beside what was taken.

        Raises:
            TooFewError: Fewer members told their shares than give a secret back.
            MisbehavedError: A member tells what it was not sent, or its own secrets are not what it
                is known by.
        """
        for told in revealed:
            self.take_revealed(told)
        if len(self._revealed) < (fewest := self.graph.threshold(self._rules)):
            raise TooFewError(
                f"members who answer to the end must be {fewest}, got "
                f"{len(self._revealed)}; the round is done again"
            )
        total = self._sum.copy()
        for name in sorted(self._alive()):
            seed = self._join(name, {own.name: own.own_masks for own in self._revealed.values()})
            if commitment(seed) != self._members[name].own_mask:
                raise MisbehavedError(name, f"shares of {name} must give back its mask")
            total -= expand(seed, len(total))
        for name in sorted(self._gone()):
            beside = sorted(self.graph.neighbors(name) & self._alive())
            if not beside:
                continue
            key = self._join(name, {own.name: own.mask_keys for own in self._revealed.values()})
            if public_of(key) != self._members[name].mask_key:
                raise MisbehavedError(name, f"shares of {name} must give back its key")
            for other in beside:
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

    def _alive(self) -> frozenset[str]:
        return frozenset(self._signatures)

    def _gone(self) -> frozenset[str]:
        return frozenset(self._shared) - self._alive()

    def _join(self, owner: str, told: Mapping[str, Mapping[str, bytes]]) -> bytes:
        holders = self.graph.holders(owner)
        found = {point_of(name, holders): own[owner] for name, own in told.items() if owner in own}
        fewest = self.graph.threshold(self._rules)
        if len(found) < fewest:
            raise TooFewError(
                f"shares of {owner} must be at least {fewest}, got {len(found)}; the round is done "
                "again"
            )
        try:
            return join(found, fewest)
        except ValueError as error:
            raise MisbehavedError(owner, f"shares of {owner}: {error}") from error

    def _check(self, members: Collection[str]) -> None:
        if len(members) < self._rules.fewest:
            raise TooFewError(
                f"members must be at least {self._rules.fewest}, got {len(members)}; the round is "
                "done again"
            )
