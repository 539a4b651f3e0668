"""Whose updates a site lets its own be added to: the public keys that its owner was given.

They come from the other owners, not from the coordinator: who says which keys are whose could
otherwise be all the others. A site signs with the key by which the coordinator knows it too.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from orchard.deployment.key_files import SITE_NAME
from orchard.secure.signing import SiteSigningKey, SiteVerifyingKey

MAX_KEY_BYTES = 4096


def read_signing_key(path: Path) -> SiteSigningKey:
    """Read a site's own private key.

    Raises:
        ValueError: It is none that orchard keys makes.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except ValueError as error:
        raise ValueError(f"{path} must hold a site's private key, got none ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(f"{path} must hold a key of P-384, got another; make it with orchard keys")
    return SiteSigningKey(key)


def read_peers(folder: Path, *, name: str, own: SiteSigningKey) -> dict[str, SiteVerifyingKey]:
    """Read the public keys of the sites that a site sums with, its own among them.

    Args:
        folder: Of their files ``NAME.pub``.
        name: Of this site.
        own: Its key.

    Raises:
        FileNotFoundError: There is no such folder, or nobody else's key in it.
        ValueError: A file holds no key, two sites have the same one, or one is called as this site
            and is not its own.
    """
    found = {name: SiteVerifyingKey(own.key.public_key())}
    paths = sorted(folder.glob("*.pub"))
    seen = {_raw(found[name]): name}
    for path in paths:
        if not SITE_NAME.fullmatch(path.stem):
            raise ValueError(f"{path} must be called as a site, got {path.stem!r}; rename it")
        key = SiteVerifyingKey(_read_public(path))
        if path.stem == name and _raw(key) != _raw(found[name]):
            raise ValueError(f"{path} must be this site's own key, got another")
        other = seen.setdefault(_raw(key), path.stem)
        if other != path.stem:
            raise ValueError(
                f"{path} must hold another key than {other}'s, got the same; one site would count "
                "for two"
            )
        found[path.stem] = key
    if len(found) < 2:
        raise FileNotFoundError(
            f"--peers must hold the public keys of other sites as NAME.pub, got none in {folder}; "
            "their owners give them to you"
        )
    return found


def _read_public(path: Path) -> ec.EllipticCurvePublicKey:
    content = path.read_bytes()[: MAX_KEY_BYTES + 1]
    try:
        if len(content) > MAX_KEY_BYTES:
            raise ValueError("too long")
        key = serialization.load_ssh_public_key(content)
    except ValueError as error:
        raise ValueError(f"{path} must hold a site's public key, got none ({error})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError(f"{path} must hold a key of P-384, got another; make it with orchard keys")
    return key


def _raw(key: SiteVerifyingKey) -> bytes:
    return key.key.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )
