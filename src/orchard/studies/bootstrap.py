"""How far a difference between two methods is to be trusted: a bootstrap over seeds, clients, rows.

Both methods are measured on the same rows of the same clients under the same seeds. A replicate
draws seeds with replacement, for each of them clients, for each of these test rows, and takes the
mean difference of what was drawn. What differs between rows is paired away; what differs between
clients and seeds widens the interval. With few seeds an interval is too narrow rather than too
wide: three values tell little of how seeds vary.

Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3 (percentiles);
Holm (1979) for many comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_REPLICATES = 10_000
_DRAWS_OF_ROWS = 2_000  # of each client and seed, from which replicates draw


@dataclass(frozen=True)
class Pair:
    """What two methods scored on the same rows of one client.

    Attributes:
        own: Of the method, summed over what ``weight`` counts, (n,).
        reference: Of the method that it is compared with, (n,).
        weight: How much each row counts: tokens for a loss, else 1, (n,).
    """

    own: Array
    reference: Array
    weight: Array

    @property
    def difference(self) -> float:
        """Method less reference."""
        return float((self.own - self.reference).sum() / self.weight.sum())


@dataclass(frozen=True)
class Interval:
    """A mean difference, and how far it is to be trusted.

    Attributes:
        mean: Over seeds of the mean over clients.
        low: Where the 95 % interval begins.
        high: Where it ends.
        p: Twice the share of replicates on the other side of zero, at most 1.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def holds_zero(self) -> bool:
        """Whether no difference is seen."""
        return self.low <= 0 <= self.high


def paired_interval(
    pairs: Sequence[Sequence[Pair]], generator: np.random.Generator, *, is_shared: bool
) -> Interval:
    """Return the interval of a mean paired difference.

    Args:
        pairs: For each seed, of each client.
        generator: Where draws come from.
        is_shared: Whether the clients of a seed were measured on the same rows, which then are
            drawn for all of them together.

    Raises:
        ValueError: There is no seed, or one has no client.
    """
    if not pairs or not all(pairs):
        raise ValueError("pairs must have a client for every seed, got none; run the study first")
    mean = float(np.mean([np.mean([pair.difference for pair in of_seed]) for of_seed in pairs]))
    drawn = [_draw_rows(of_seed, generator, is_shared=is_shared) for of_seed in pairs]
    total = np.zeros(_REPLICATES)
    seeds = generator.integers(len(pairs), size=(_REPLICATES, len(pairs)))
    for place in range(len(pairs)):
        for seed, draws_CB in enumerate(drawn):
            (chosen,) = np.nonzero(seeds[:, place] == seed)
            num_clients, num_draws = draws_CB.shape
            shape = (len(chosen), num_clients)
            clients = generator.integers(num_clients, size=shape)
            rows = generator.integers(num_draws, size=(len(chosen), 1) if is_shared else shape)
            total[chosen] += draws_CB[clients, rows].mean(axis=1)
    means = total / len(pairs)
    low, high = np.percentile(means, [2.5, 97.5])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Interval(mean, float(low), float(high), min(1.0, 2 * (tail + 1) / (_REPLICATES + 1)))


def _draw_rows(pairs: Sequence[Pair], generator: np.random.Generator, *, is_shared: bool) -> Array:
    """Return the differences of each client on draws of its rows, (C, B)."""
    drawn: list[Array] = []
    index = None
    for pair in pairs:
        number = len(pair.weight)
        if index is None or not is_shared:
            index = generator.integers(number, size=(_DRAWS_OF_ROWS, number))
        gain = (pair.own - pair.reference)[index].sum(axis=1)
        drawn.append(gain / pair.weight[index].sum(axis=1))
    return np.stack(drawn)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method, in their order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected
