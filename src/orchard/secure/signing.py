"""Keys by which members of a sum know each other: whatever signs, and whatever checks it.

A site signs with the key by which its coordinator knows it too, one of NIST's P-384 (ECDSA with
SHA-384); members that live for one process sign with Ed25519. What is signed begins with what it is
for, so that no signature of one kind passes for one of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA384

MAX_SIGNATURE_BYTES = 128
"""Of any key here; those of P-384 have up to 104."""


class SigningKey(Protocol):
    """What a member signs with."""

    def sign(self, statement: bytes, /) -> bytes:
        """Return a signature."""
        ...


class VerifyingKey(Protocol):
    """What the others know a member by."""

    def verify(self, signature: bytes, statement: bytes, /) -> None:
        """Check a signature.

        Raises:
            InvalidSignature: It is none of this statement by this member.
        """
        ...


Roster: TypeAlias = Mapping[str, VerifyingKey]
"""Member to the key that the others know it by, as they were told, not as a coordinator says it."""


@dataclass(frozen=True)
class SiteSigningKey:
    """A site's own key.

    Attributes:
        key: Of P-384.
    """

    key: EllipticCurvePrivateKey

    def sign(self, statement: bytes, /) -> bytes:
        """Return a signature."""
        return self.key.sign(statement, ECDSA(SHA384()))


@dataclass(frozen=True)
class SiteVerifyingKey:
    """Another site's key.

    Attributes:
        key: Of P-384.
    """

    key: EllipticCurvePublicKey

    def verify(self, signature: bytes, statement: bytes, /) -> None:
        """Check a signature.

        Raises:
            InvalidSignature: It is none of this statement by this site.
        """
        self.key.verify(signature, statement, ECDSA(SHA384()))
