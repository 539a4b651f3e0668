"""Secure sums of made-up members, for tests of both sides."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orchard.secure.collector import Collector
from orchard.secure.fixed_point import Vector
from orchard.secure.member import Member
from orchard.secure.rules import Revealed, Rules, default_threshold


@dataclass
class Sum:
    """One sum and its members, before anything was said."""

    members: dict[str, Member]
    collector: Collector
    rules: Rules

    def begin(self, silent: Collection[str] = ()) -> None:
        """Advertise keys and share secrets; who is silent does not share."""
        advertised = {name: member.advertise() for name, member in self.members.items()}
        self.collector.take_advertisements(advertised)
        self.collector.take_shares(
            {
                name: member.share(advertised)
                for name, member in self.members.items()
                if name not in silent
            }
        )

    def send(self, vectors: Mapping[str, Vector]) -> dict[str, Vector]:
        """Mask and add vectors; return what was sent."""
        sent = {}
        for name, vector in vectors.items():
            handed = self.collector.shares_for(name)
            masked = self.members[name].mask(self.collector.sharing, handed, vector)
            self.collector.add(masked)
            sent[name] = masked.vector
        return sent

    def end(self, answering: Collection[str] | None = None) -> Vector:
        """Confirm, reveal, and return the sum; those who answer are all survivors by default."""
        survivors = self.collector.survivors()
        confirmed = {name: self.members[name].confirm(survivors) for name in survivors}
        revealed: list[Revealed] = [
            self.members[name].reveal(confirmed) for name in answering or survivors
        ]
        return self.collector.unmask(revealed)


def make_sum(
    number: int, length: int, *, least: int = 2, threshold: int = 0, num_neighbors: int = 0
) -> Sum:
    """Return a sum of so many members, ``m00`` and so on."""
    names = [f"m{index:02}" for index in range(number)]
    signing = {name: Ed25519PrivateKey.generate() for name in names}
    roster = {name: key.public_key() for name, key in signing.items()}
    rules = Rules(least, threshold or default_threshold(number), num_neighbors)
    session = secrets.token_bytes(16)
    members = {name: Member(name, signing[name], roster, rules, session) for name in names}
    return Sum(members, Collector(rules, session, length), rules)
