"""Client-level differential privacy: what one client changes is bounded, and noise hides it.

The update of a client is one vector over all names of the global tree; a name that it did not send
is zero in it. Every vector is scaled down to a norm, they are summed with equal weights, Gaussian
noise is added to every name, and the sum is divided by the expected number of clients, which is no
secret: McMahan et al., 2018, arXiv:1710.06963. With a quantile the norm follows the clients' own:
Andrew et al., 2021, arXiv:1905.03871.

Numbers of 32 bits are not the real numbers of the proofs: noise in floating point leaks in its
lowest bits to whoever sees the sum itself (Mironov, 2012). Here only the global values after the
step are seen, rounded to float32, which weakens that attack and does not exclude it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from orchard.communication.messages import Update
from orchard.seeding import Seeds, system_normal
from orchard.trees import Tree

Noise: TypeAlias = Callable[[int, str, tuple[int, ...]], torch.Tensor]
"""From round, name and shape to independent standard normal values in float32."""

SLOT = "privacy"
_CLIP = "clip"
_CLIP_RATE = 0.2  # how fast the norm follows its quantile, as in the paper
# So that rounding to float32 does not make a scaled vector longer than its norm.
_MARGIN = 1 - 1e-6


@dataclass(frozen=True)
class Protection:
    """What is done to the updates of a round.

    Attributes:
        noise: Standard deviation over the norm, of everything that a round reveals.
        clip: L2 norm of a client's vector in the first round.
        expected: Expected number of clients in a round: their number times the sampling rate.
        quantile: Share of clients whose update is shorter than the norm that later rounds aim at;
            0 = the norm stays.
        draw: The noise.
    """

    noise: float
    clip: float
    expected: float
    quantile: float
    draw: Noise

    @property
    def count_noise(self) -> float:
        """Standard deviation on the number of clients below the norm, a twentieth of them."""
        return self.expected / 20

    @property
    def sum_noise(self) -> float:
        """Standard deviation on the sum over the norm, where the count takes its part of it.

        Raises:
            ValueError: The count's noise alone is not enough.
        """
        if not self.quantile:
            return self.noise
        left = self.noise**-2 - (2 * self.count_noise) ** -2 if self.noise else math.inf
        if left <= 0:
            raise ValueError(
                f"privacy.clip_quantile must be 0 with {self.expected:g} clients in a round and "
                f"noise of {self.noise:.3g}, got {self.quantile:g}; the count of so few clients "
                "would take the whole budget"
            )
        return float(left**-0.5)

    def aggregate(
        self,
        updates: Iterable[Update],
        shared: Tree,
        slots: Mapping[str, Tree],
        *,
        round_number: int,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Tree]]:
        """Return the noisy mean delta of every global name, and what the next round needs.

        Args:
            updates: Of the round, read once; there may be none.
            shared: The global tree before it.
            slots: As the last round returned them.
            round_number: Of this round, from 1.
        """
        clip = self._clip(slots)
        sums = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in shared.items()}
        below = 0.0
        for update in updates:
            own = {name: t.float() for name, t in update.delta.items() if name in sums}
            norm = math.sqrt(math.fsum(float(t.double().square().sum()) for t in own.values()))
            below += (norm <= clip) - 0.5
            if not math.isfinite(norm):
                continue  # it says nothing, and must not be seen in the sum
            scale = min(1.0, _MARGIN * clip / norm) if norm else 0.0
            for name, tensor in own.items():
                sums[name].add_(tensor, alpha=scale)
        spread = self.sum_noise * clip
        for name, total in sums.items():
            if spread:
                total.add_(self.draw(round_number, name, tuple(total.shape)), alpha=spread)
            total.div_(self.expected)
        if not self.quantile:
            return sums, {}
        counted = below + self.count_noise * float(self.draw(round_number, f"/{_CLIP}", ()))
        share = counted / self.expected + 0.5
        following = clip * math.exp(-_CLIP_RATE * (share - self.quantile))
        return sums, {SLOT: {_CLIP: torch.tensor(following, dtype=torch.float64)}}

    def _clip(self, slots: Mapping[str, Tree]) -> float:
        return float(slots[SLOT][_CLIP]) if SLOT in slots else self.clip


def seeded_noise(seeds: Seeds) -> Noise:
    """Return noise that repeats with the recipe's seed, which is no secret: for experiments."""

    def draw(round_number: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = seeds.generator("privacy", round_number, name).standard_normal(shape, np.float32)
        return torch.from_numpy(np.asarray(values))

    return draw


def system_noise(round_number: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return noise from the operating system's random numbers, which nobody can draw again."""
    return torch.from_numpy(system_normal(shape))
