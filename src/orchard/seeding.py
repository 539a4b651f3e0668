"""One seed, and an independent generator for every (purpose, round, client).

A draw depends on what it is for, never on what was drawn before it: a run that resumes at round
7 draws in round 7 what the uninterrupted run drew, and adding a client disturbs no other.
"""

from __future__ import annotations

import hashlib
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
