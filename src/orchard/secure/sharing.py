"""A secret in parts, of which a threshold gives it back and fewer tell nothing.

Source: Shamir (1979), How to Share a Secret; over the integers modulo 2**521 - 1, a prime above
every secret of 32 bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

SECRET_BYTES = 32
SHARE_BYTES = 66
_PRIME = 2**521 - 1


def split(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Return a share of a secret for each point.

    Args:
        secret: ``SECRET_BYTES`` bytes.
        points: Different numbers above 0, one for each holder.
        threshold: So many shares give the secret back.

    Raises:
        ValueError: The secret has another length, a point is 0 or given twice, or there are fewer
            points than the threshold.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"secret must have {SECRET_BYTES} bytes, got {len(secret)}")
    if len({*points}) != len(points) or any(not 0 < point < _PRIME for point in points):
        raise ValueError("points must be different and above 0, got others")
    if not 0 < threshold <= len(points):
        raise ValueError(f"threshold must be 1 to {len(points)}, got {threshold}")
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [secrets.randbelow(_PRIME) for _ in range(threshold - 1)]
    shares = {}
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % _PRIME
        shares[point] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def join(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret of at least ``threshold`` shares.

    Args:
        shares: Point to share.
        threshold: As it was split.

    Raises:
        ValueError: There are too few, or they are not all of one secret of ``SECRET_BYTES`` bytes.
    """
    if len(shares) < threshold:
        raise ValueError(f"shares must be at least {threshold}, got {len(shares)}")
    points = sorted(shares)[:threshold]
    total = 0
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above = above * other % _PRIME
                below = below * (other - point) % _PRIME
        value = int.from_bytes(shares[point], "big")
        total = (total + value * above * pow(below, -1, _PRIME)) % _PRIME
    if total >> (8 * SECRET_BYTES):
        raise ValueError("shares must be of one secret, got some that are not")
    return total.to_bytes(SECRET_BYTES, "big")
