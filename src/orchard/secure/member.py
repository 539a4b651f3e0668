"""A member's side of one secure sum, from its keys to what it tells at the end.

Each step is done once, in order; what is asked twice or too early is refused. Keys and seeds are
made anew for every sum and are nowhere but in this object: a member that is killed has left the
sum, and no mask is ever used for two vectors. Everything is checked that would let a coordinator
learn more than the sum: few members, keys of its own making, different survivors for different
members, both secrets of one member.

Source: Bonawitz et al. (2017), Practical Secure Aggregation for Privacy-Preserving Machine
Learning, figure 4 with its consistency check.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import replace

from cryptography.exceptions import InvalidSignature

from orchard.secure.fixed_point import Vector
from orchard.secure.graph import Graph, order_seed
from orchard.secure.masks import agree, check_public, expand, public_of, seal, unseal
from orchard.secure.rules import (
    Advertisement,
    BrokenRuleError,
    Handed,
    Masked,
    Revealed,
    Rules,
    Shared,
    commitment,
    point_of,
    share_digest,
    sharing_statement,
    survivors_statement,
)
from orchard.secure.sharing import SECRET_BYTES, SHARE_BYTES, split
from orchard.secure.signing import Roster, SigningKey


class Member:
    """One member in one sum."""

    def __init__(
        self, name: str, signing: SigningKey, roster: Roster, rules: Rules, session: bytes
    ) -> None:
        """Make keys for this sum, which are in no file and in no other sum.

        Args:
            name: Of this member, in the roster.
            signing: Its own key.
            roster: All who may be members.
            rules: What it holds the coordinator to.
            session: Of this sum alone; all that its members must agree on is in it.
        """
        self._name, self._signing, self._roster = name, signing, roster
        self._rules, self._session = rules, session
        self._mask_key, self._share_key = secrets.token_bytes(32), secrets.token_bytes(32)
        self._own_mask = secrets.token_bytes(SECRET_BYTES)
        self._members: dict[str, Advertisement] = {}
        self._sharing: frozenset[str] = frozenset()
        self._survivors: frozenset[str] = frozenset()
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._step = 0

    @property
    def survivors(self) -> frozenset[str]:
        """Whose vectors are in the sum, once this member has confirmed it."""
        return self._survivors

    def advertise(self) -> Advertisement:
        """Return this member's public keys."""
        self._begin(1)
        unsigned = Advertisement(
            self._name,
            public_of(self._mask_key),
            public_of(self._share_key),
            commitment(self._own_mask),
            b"",
        )
        signature = self._signing.sign(unsigned.signed(self._session))
        self._own = replace(unsigned, signature=signature)
        return self._own

    def share(self, advertised: Mapping[str, Advertisement]) -> Shared:
        """Return a share of both of its secrets for each neighbor, sealed for it alone.

        Raises:
            BrokenRuleError: Members are too few, not in the roster or not who signed, or this
                member's own keys are not among them.
        """
        self._begin(2)
        self._check_members(advertised)
        self._members = dict(advertised)
        seed = order_seed(self._session, [own.signed(self._session) for own in advertised.values()])
        self._graph = Graph(frozenset(advertised), self._rules.num_neighbors, seed)
        holders = self._graph.holders(self._name)
        points = {name: point_of(name, holders) for name in holders}
        threshold = self._graph.threshold(self._rules)
        seeds = split(self._own_mask, list(points.values()), threshold)
        keys = split(self._mask_key, list(points.values()), threshold)
        both = {name: (seeds[point], keys[point]) for name, point in points.items()}
        self._shares[self._name] = both[self._name]
        sealed = {
            name: seal(self._key_with(name), b"".join(both[name]), self._about(self._name, name))
            for name in sorted(self._graph.neighbors(self._name))
        }
        digests = {name: self._digests(self._name, name, own) for name, own in both.items()}
        return Shared(self._name, sealed, digests)

    def mask(
        self, sharing: Collection[str], handed: Mapping[str, Handed], vector: Vector
    ) -> Masked:
        """Return a vector under masks.

        A neighbor's shares that cannot be read cost nothing but that this member cannot help to
        bring that one's secret back; it says so.

        Args:
            sharing: All who shared their secrets, this member among them.
            handed: From each neighbor among them, what it sealed for this member.
            vector: What is to be added, (n,).

        Raises:
            BrokenRuleError: Too few shared, or shares are of others than this member's neighbors.
        """
        self._begin(3)
        self._sharing = frozenset(sharing)
        self._rules.check(len(self._sharing), "members who shared their secrets")
        if not self._members.keys() >= self._sharing or self._name not in self._sharing:
            raise BrokenRuleError(
                "who shared secrets must be members of this sum, this one among them, got others"
            )
        beside = self._graph.neighbors(self._name) & self._sharing
        if handed.keys() != beside:
            raise BrokenRuleError("shares must be of all neighbors who shared, got others")
        if len(beside) + 1 < (fewest := self._graph.threshold(self._rules)):
            raise BrokenRuleError(
                f"neighbors who shared must be at least {fewest - 1}, got {len(beside)}; this "
                "member would not be hidden among them"
            )
        unreadable = tuple(name for name in sorted(handed) if not self._open(name, handed[name]))
        masked = vector + expand(self._own_mask, len(vector))
        for name in sorted(beside):
            add_pair(
                masked,
                self._mask_key,
                self._members[name].mask_key,
                self._session,
                of=self._name,
                other=name,
            )
        signature = self._signing.sign(sharing_statement(self._session, self._sharing))
        return Masked(self._name, masked, signature, unreadable)

    def confirm(self, survivors: Mapping[str, bytes]) -> bytes:
        """Return this member's signature of whose vectors are in the sum.

        Args:
            survivors: Member to its signature of who shared secrets, as it was told.

        Raises:
            BrokenRuleError: They are too few, were told of others who shared than this member, do
                not hang together by masks, or this member is not among them.
        """
        self._begin(4)
        self._rules.check(len(survivors), "survivors")
        if not self._sharing.issuperset(survivors) or self._name not in survivors:
            raise BrokenRuleError("survivors must be members who shared, this one among them")
        statement = sharing_statement(self._session, self._sharing)
        for name, signature in survivors.items():
            self._check_signature(name, signature, statement)
        if not self._graph.is_connected(survivors):
            raise BrokenRuleError(
                "survivors must hang together by masks, got groups that share none; each group "
                "would be a sum of its own"
            )
        self._survivors = frozenset(survivors)
        return self._signing.sign(survivors_statement(self._session, survivors))

    def reveal(self, confirmed: Mapping[str, bytes]) -> Revealed:
        """Return shares of one secret of each neighbor: never of both.

        Args:
            confirmed: Member to its signature of the survivors.

        Raises:
            BrokenRuleError: Too few survivors signed the same as this member.
        """
        self._begin(5)
        self._rules.check(len(confirmed), "survivors who agree on who they are")
        statement = survivors_statement(self._session, self._survivors)
        for name, signature in confirmed.items():
            if name not in self._survivors:
                raise BrokenRuleError(f"who confirms must be a survivor, got {name}")
            self._check_signature(name, signature, statement)
        gone = self._sharing - self._survivors
        held = self._shares.keys()
        return Revealed(
            self._name,
            {name: self._shares[name][0] for name in sorted(self._survivors & held)},
            {name: self._shares[name][1] for name in sorted(gone & held)},
        )

    def _check_members(self, advertised: Mapping[str, Advertisement]) -> None:
        self._rules.check(len(advertised), "a sum")
        if 3 * self._rules.threshold <= 2 * len(advertised):
            raise BrokenRuleError(
                f"threshold must be above two thirds of {len(advertised)} members, got "
                f"{self._rules.threshold}; two groups could each be told another story"
            )
        if advertised.get(self._name) != self._own:
            raise BrokenRuleError("this member's keys must be among them, got others")
        for name, own in advertised.items():
            self._check_signature(name, own.signature, own.signed(self._session))
            if own.name != name:
                raise BrokenRuleError(f"keys of {name} must be its own, got those of {own.name}")
            for key in (own.mask_key, own.share_key):
                check_public(key, of=name)
        keys = [key for own in advertised.values() for key in (own.mask_key, own.share_key)]
        if len({*keys}) != len(keys):
            raise BrokenRuleError("keys must differ between members, got one twice")

    def _open(self, name: str, handed: Handed) -> bool:
        """Keep the shares of a neighbor, and say whether they are what it said they are."""
        try:
            both = unseal(self._key_with(name), handed.sealed, self._about(name, self._name))
        except ValueError:
            return False
        own = both[:SHARE_BYTES], both[SHARE_BYTES:]
        if len(both) != 2 * SHARE_BYTES or self._digests(name, self._name, own) != handed.digests:
            return False
        self._shares[name] = own
        return True

    @staticmethod
    def _digests(owner: str, holder: str, both: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        return share_digest(owner, holder, both[0]), share_digest(owner, holder, both[1])

    def _begin(self, step: int) -> None:
        if self._step != step - 1:
            raise BrokenRuleError(
                f"step {step} must come once and after {step - 1}, got it after {self._step}; a "
                "sum that was cut off is begun anew, with new masks"
            )
        self._step = step

    def _check_signature(self, name: str, signature: bytes, statement: bytes) -> None:
        if name not in self._roster:
            raise BrokenRuleError(f"members must be in the roster, got {name}")
        try:
            self._roster[name].verify(signature, statement)
        except InvalidSignature as error:
            raise BrokenRuleError(
                f"what {name} says must be signed by {name}, got another signature"
            ) from error

    def _key_with(self, name: str) -> bytes:
        return agree(self._share_key, self._members[name].share_key, self._session + b"shares")

    def _about(self, sender: str, receiver: str) -> bytes:
        return repr((self._session, sender, receiver)).encode()


def add_pair(
    vector: Vector, private: bytes, public: bytes, session: bytes, *, of: str, other: str
) -> None:
    """Add the mask between two members to a vector in place, with the sign that ``of`` gives it.

    The other one's has the other sign, so the sum of both is 0.
    """
    mask = expand(agree(private, public, session + b"mask"), len(vector))
    if of < other:
        vector += mask
    else:
        vector -= mask
