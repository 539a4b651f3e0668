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
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from orchard.secure.fixed_point import Vector
from orchard.secure.masks import agree, expand, public_of, seal, unseal
from orchard.secure.rules import (
    Advertisement,
    BrokenRuleError,
    Revealed,
    Rules,
    commitment,
    point_of,
    survivors_statement,
)
from orchard.secure.sharing import SECRET_BYTES, SHARE_BYTES, split

Roster = Mapping[str, Ed25519PublicKey]
"""Member to the key by which it signs, as members know it, not as the coordinator says it."""


class Member:
    """One member in one sum."""

    def __init__(
        self, name: str, signing: Ed25519PrivateKey, roster: Roster, rules: Rules, session: bytes
    ) -> None:
        """Make keys for this sum.

        Args:
            name: Of this member, in the roster.
            signing: Its own key.
            roster: All who may be members.
            rules: What it holds the coordinator to.
            session: Of this sum alone.
        """
        self._name, self._signing, self._roster = name, signing, roster
        self._rules, self._session = rules, session
        self._mask_key, self._share_key = secrets.token_bytes(32), secrets.token_bytes(32)
        self._own_mask = secrets.token_bytes(SECRET_BYTES)
        self._others: dict[str, Advertisement] = {}
        self._sharing: frozenset[str] = frozenset()
        self._survivors: frozenset[str] = frozenset()
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._step = 0

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

    def share(self, advertised: Mapping[str, Advertisement]) -> dict[str, bytes]:
        """Return a share of both of its secrets for each other member, sealed for it alone.

        Raises:
            BrokenRuleError: Members are too few, not in the roster or not who signed, or this
                member's own keys are not among them.
        """
        self._begin(2)
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
        keys = [key for own in advertised.values() for key in (own.mask_key, own.share_key)]
        if len({*keys}) != len(keys):
            raise BrokenRuleError("keys must differ between members, got one twice")
        self._others = {name: own for name, own in advertised.items() if name != self._name}
        points = {name: point_of(name, advertised) for name in advertised}
        seeds = split(self._own_mask, list(points.values()), self._rules.threshold)
        keys_ = split(self._mask_key, list(points.values()), self._rules.threshold)
        own_point = points[self._name]
        self._shares[self._name] = seeds[own_point], keys_[own_point]
        return {
            name: seal(
                self._key_with(name),
                seeds[points[name]] + keys_[points[name]],
                self._about(self._name, name),
            )
            for name in self._others
        }

    def mask(self, sealed: Mapping[str, bytes], vector: Vector) -> Vector:
        """Return a vector under masks, (n,).

        Args:
            sealed: From every other member that shared its secrets.
            vector: What is to be added, (n,).

        Raises:
            BrokenRuleError: Too few shared, or what one shared was changed on its way.
        """
        self._begin(3)
        self._rules.check(len(sealed) + 1, "members who shared their secrets")
        for name, content in sealed.items():
            if name not in self._others:
                raise BrokenRuleError(f"shares must be of members of this sum, got {name}'s")
            both = unseal(self._key_with(name), content, self._about(name, self._name))
            if len(both) != 2 * SHARE_BYTES:
                raise BrokenRuleError(f"shares of {name} must have {2 * SHARE_BYTES} bytes")
            self._shares[name] = both[:SHARE_BYTES], both[SHARE_BYTES:]
        self._sharing = frozenset((*sealed, self._name))
        masked = vector + expand(self._own_mask, len(vector))
        for name in sorted(sealed):
            add_pair(
                masked,
                self._mask_key,
                self._others[name].mask_key,
                self._session,
                of=self._name,
                other=name,
            )
        return masked

    def confirm(self, survivors: Collection[str]) -> bytes:
        """Return this member's signature of whose vectors are in the sum.

        Raises:
            BrokenRuleError: They are too few, or were no members when secrets were shared, or this
                member is not among them.
        """
        self._begin(4)
        self._rules.check(len({*survivors}), "survivors")
        if not self._sharing.issuperset(survivors) or self._name not in survivors:
            raise BrokenRuleError("survivors must be members who shared, this one among them")
        self._survivors = frozenset(survivors)
        return self._signing.sign(survivors_statement(self._session, survivors))

    def reveal(self, confirmed: Mapping[str, bytes]) -> Revealed:
        """Return shares of one secret of each member: never of both.

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
        return Revealed(
            self._name,
            {name: self._shares[name][0] for name in sorted(self._survivors)},
            {name: self._shares[name][1] for name in sorted(gone)},
        )

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
        return agree(self._share_key, self._others[name].share_key, self._session + b"shares")

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
