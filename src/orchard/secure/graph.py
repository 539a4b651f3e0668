"""Who masks with whom: everybody with everybody, or each with some neighbors.

Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, Bell et al. (2020), algorithm 1:
1. Members are put in an order that looks random, from what all of them said at the beginning.
2. Each is a neighbor of the nearest ``k / 2`` on either side, in a circle (a Harary graph).
3. It agrees on masks with them alone, and they alone hold shares of its secrets.
4. So a member's work and messages grow with ``k``, not with the number of members.
Here every member also checks that whose vectors are in the sum hang together by masks, since two
groups that share none would be two sums.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from orchard.secure.rules import Rules


@dataclass(frozen=True)
class Graph:
    """The members of one sum and who is whose neighbor.

    Attributes:
        members: Their names.
        num_neighbors: Of each, an even number; 0 = all others, as also where it is as many or more.
        seed: What orders them.
    """

    members: frozenset[str]
    num_neighbors: int
    seed: bytes

    @property
    def is_complete(self) -> bool:
        """Whether everybody is everybody's neighbor."""
        return not 0 < self.num_neighbors < len(self.members) - 1

    def neighbors(self, name: str) -> frozenset[str]:
        """Return a member's neighbors, without itself."""
        if self.is_complete:
            return self.members - {name}
        place, number = self._places[name], len(self._order)
        reach = range(1, self.num_neighbors // 2 + 1)
        return frozenset(
            self._order[(place + sign * step) % number] for step in reach for sign in (1, -1)
        )

    def holders(self, name: str) -> frozenset[str]:
        """Return who holds shares of a member's secrets: its neighbors and itself."""
        return self.neighbors(name) | {name}

    def threshold(self, rules: Rules) -> int:
        """Return how many shares give a member's secret back.

        Among all members that is the rules' own threshold. Among neighbors it is more than half of
        who holds a share: that no two groups are told different stories is for all members to see
        to, and here it is only so many neighbors who would have to break their word.
        """
        return rules.threshold if self.is_complete else (self.num_neighbors + 1) // 2 + 1

    def is_connected(self, among: Collection[str]) -> bool:
        """Say whether some members hang together by the masks between them."""
        if self.is_complete or not among:
            return True
        left = set(among)
        waiting = deque([min(left)])
        left.discard(waiting[0])
        while waiting:
            found = self.neighbors(waiting.popleft()) & left
            left -= found
            waiting.extend(found)
        return not left

    @cached_property
    def _order(self) -> list[str]:
        return sorted(
            self.members,
            key=lambda name: hashlib.sha256(self.seed + b"place" + name.encode()).digest(),
        )

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self._order)}


def order_seed(session: bytes, signed: Iterable[bytes]) -> bytes:
    """Return what orders members: it depends on every key of everybody, fresh for this sum."""
    whole = hashlib.sha256(b"order" + session)
    for statement in sorted(signed):
        whole.update(hashlib.sha256(statement).digest())
    return whole.digest()
