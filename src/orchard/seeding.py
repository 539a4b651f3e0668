"""One seed, and an independent generator for every (purpose, round, client).

A draw depends on what it is for, never on what was drawn before it: a run that resumes at round
7 draws in round 7 what the uninterrupted run drew, and adding a client disturbs no other.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seeds:
    """The root of all randomness in a run.

    Attributes:
        root: The seed of the recipe.
    """

    root: int

    def integer(self, *key: str | int) -> int:
        """Return 63 bits that depend on the root and on every part of ``key``."""
        text = "\x1f".join(str(part) for part in (self.root, *key))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, *key: str | int) -> np.random.Generator:
        """Return a NumPy generator of its own for ``key``, such as ``("batches", 3, "a")``."""
        return np.random.Generator(np.random.PCG64(self.integer(*key)))


def system_normal(shape: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return standard normal values from the operating system's random numbers.

    Nobody can draw them again. Source: Box and Muller (1958), over uniform values of 53 bits.
    """
    number = math.prod(shape)
    half = (number + 1) // 2
    drawn = np.frombuffer(os.urandom(16 * half), dtype=np.uint64) >> np.uint64(11)
    first, second = ((drawn + 0.5) * 2.0**-53).reshape(2, half)
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:number]
    return values.astype(np.float32).reshape(shape)
