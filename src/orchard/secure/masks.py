"""Keys of two members, what they agree on, and the long masks that follow from short seeds."""

from __future__ import annotations

import os

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from orchard.secure.fixed_point import Vector

_NONCE_BYTES = 12
_ANY_KEY = b"\1" * 32  # of nobody: what a public key is tried with


def public_of(private: bytes) -> bytes:
    """Return the public key of a private one, 32 bytes each."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, about: bytes) -> bytes:
    """Return the 32 bytes that two members both know, and nobody else.

    Args:
        private: Of the one.
        public: Of the other.
        about: What they are for; other bytes for every purpose and round.

    Raises:
        ValueError: The public key is one that agrees with everybody on the same.
    """
    other = X25519PublicKey.from_public_bytes(public)
    secret = X25519PrivateKey.from_private_bytes(private).exchange(other)
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=about).derive(secret)


def check_public(key: bytes, *, of: str) -> None:
    """Refuse a public key that no private one has, or that agrees with everybody on the same.

    Raises:
        ValueError: It is one.
    """
    try:
        agree(_ANY_KEY, key, b"")
    except ValueError as error:
        raise ValueError(f"keys of {of} must be public keys of X25519, got another") from error


def expand(seed: bytes, length: int) -> Vector:
    """Return whole numbers that look random to whoever lacks the seed, (length,).

    A seed must be expanded for one vector alone. Source: ChaCha20, RFC 8439.
    """
    stream = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * length)), dtype="<u4").astype(np.uint32)


def seal(key: bytes, content: bytes, about: bytes) -> bytes:
    """Return content that only who has the key can read, and nobody can change or say of another.

    Args:
        key: 32 bytes.
        content: To be hidden.
        about: Who sends it to whom.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Return what was sealed.

    Raises:
        ValueError: It was sealed with another key or about something else, or was changed.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise ValueError("sealed shares must be as they were sent, got others") from error
