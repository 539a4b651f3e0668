"""A round of the simulator whose server sees the sum of the updates and none of them.

Members are made for the cohort, with signing keys that they know of each other; what the server
gets is what a ``Collector`` gets: keys, sealed shares, masked vectors, and shares at the end. The
sum of whole numbers does not depend on masks or order, so a run repeats to the bit.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orchard.communication.messages import Update
from orchard.secure.collector import Collector
from orchard.secure.fixed_point import FixedPoint
from orchard.secure.member import Member
from orchard.secure.rules import Advertisement, Revealed, Rules, Shared, default_threshold

SUM = "sum"
"""Whose update the server sees: nobody's, and everybody's."""


class SecretRound:
    """One round's sum, with both of its sides in this process."""

    def __init__(
        self, written: FixedPoint, cohort: Sequence[str], *, least: int, num_neighbors: int = 0
    ) -> None:
        """Exchange keys and shares of secrets between the members of a cohort.

        Args:
            written: How members write their updates.
            cohort: The members.
            least: Fewest members of a sum.
            num_neighbors: With how many others each member masks; 0 = with all.

        Raises:
            ValueError: The cohort is too small.
        """
        self._rules = Rules(least, default_threshold(len(cohort)), num_neighbors)
        self._written = written
        self.uplink_bytes = self.downlink_bytes = 0
        signing = {name: Ed25519PrivateKey.generate() for name in cohort}
        roster = {name: key.public_key() for name, key in signing.items()}
        session = secrets.token_bytes(16)
        self._members = {
            name: Member(name, signing[name], roster, self._rules, session) for name in cohort
        }
        self._collector = Collector(self._rules, session, self._written.length)
        advertised = {name: member.advertise() for name, member in self._members.items()}
        self._collector.take_advertisements(advertised)
        keys = sum(map(_size, advertised.values()))
        self._count(up=keys, down=keys * len(cohort))
        shared = {name: member.share(advertised) for name, member in self._members.items()}
        self._collector.take_shares(shared)
        sealed, digests = (sum(sizes) for sizes in zip(*map(_sizes, shared.values()), strict=True))
        # A digest of a share that a member keeps itself goes up alone.
        self._count(up=sealed + digests, down=sealed + digests - 64 * len(cohort))

    def send(self, update: Update) -> None:
        """Let a member send its update, masked.

        Raises:
            ValueError: A value or a weight is beyond its bound.
        """
        name = update.client_id
        try:
            vector = self._written.encode(update.delta, update.weight)
        except ValueError as error:
            error.add_note(f"client {name}, round {update.round_number}")
            raise
        handed = self._collector.shares_for(name)
        masked = self._members[name].mask(self._collector.sharing, handed, vector)
        self._collector.add(masked)
        self._count(up=masked.vector.nbytes + len(masked.signature), down=0)

    def end(self, round_number: int) -> Update:
        """Take the masks off the sum, and return its mean as one update.

        Raises:
            TooFewError: Too few members sent one.
        """
        survivors = self._collector.survivors()
        confirmed = {name: self._members[name].confirm(survivors) for name in survivors}
        revealed: list[Revealed] = [self._members[name].reveal(confirmed) for name in survivors]
        told = sum(
            len(share)
            for own in revealed
            for share in (*own.own_masks.values(), *own.mask_keys.values())
        )
        signed = sum(map(len, confirmed.values()))
        down = (sum(map(len, survivors.values())) + signed) * len(survivors)
        self._count(up=told + signed, down=down)
        mean = self._written.decode(self._collector.unmask(revealed))
        return Update(SUM, round_number, mean, dict.fromkeys(mean, 1.0))

    def _count(self, *, up: int, down: int) -> None:
        self.uplink_bytes += up
        self.downlink_bytes += down


def _size(own: Advertisement) -> int:
    return len(own.mask_key) + len(own.share_key) + len(own.own_mask) + len(own.signature)


def _sizes(own: Shared) -> tuple[int, int]:
    """Return the bytes of a member's sealed shares, and of its digests."""
    return sum(map(len, own.sealed.values())), 64 * len(own.digests)
