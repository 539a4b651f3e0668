"""How much privacy rounds cost, by Renyi accounting of Opacus.

A round adds Gaussian noise to a sum in which each client is with a probability of its own (Poisson
sampling): Mironov, Talwar and Zhang, 2019, arXiv:1908.10530. Neighbors differ in one client that is
there or not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

from orchard.extras import require

# Of the divergence; large ones count where the budget is small.
_ORDERS = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(11, 64),
    *(2**power for power in range(6, 13)),
)
_MIN_NOISE, _MAX_NOISE = 0.01, 10_000.0


def spent(*, noise: float, sampling_rate: float, rounds: int, delta: float) -> float:
    """Return epsilon after some rounds.

    Args:
        noise: Standard deviation of the noise over the norm that a client's part is clipped to.
        sampling_rate: Probability with which a client takes part in a round, in (0, 1].
        rounds: How many.
        delta: Probability with which epsilon may not hold.

    Raises:
        ValueError: Opacus is not installed.
    """
    return spent_together({(noise, sampling_rate): rounds}, delta=delta)


def spent_together(rounds: Mapping[tuple[float, float], int], *, delta: float) -> float:
    """Return epsilon after rounds of several kinds.

    Args:
        rounds: Noise and sampling rate to how many; a noise of 0 is none.
        delta: Probability with which epsilon may not hold.

    Raises:
        ValueError: Opacus is not installed.
    """
    kinds = {kind: number for kind, number in rounds.items() if number}
    if not kinds:
        return 0.0
    if any(noise == 0.0 for noise, _ in kinds):
        return math.inf
    by_kind = [
        [number * divergence for divergence in _divergences(noise, rate)]
        for (noise, rate), number in kinds.items()
    ]
    with _quiet():
        from opacus.accountants.analysis import rdp  # type: ignore[import-untyped]

        epsilon, _ = rdp.get_privacy_spent(
            orders=_ORDERS, rdp=[sum(own) for own in zip(*by_kind, strict=True)], delta=delta
        )
    return float(epsilon)


@lru_cache(maxsize=1024)
def _divergences(noise: float, sampling_rate: float) -> tuple[float, ...]:
    """Return those of one round; those of several are their sum."""
    require("privacy", to="account for privacy")
    with _quiet():
        from opacus.accountants.analysis import rdp

        return tuple(
            rdp.compute_rdp(q=sampling_rate, noise_multiplier=noise, steps=1, orders=_ORDERS)
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what Opacus says of its imports, and of first and last orders, which bound too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def noise_for(*, epsilon: float, sampling_rate: float, rounds: int, delta: float) -> float:
    """Return the least noise, to a thousandth, with which rounds cost at most ``epsilon``.

    Raises:
        ValueError: Even noise of 10,000 is too little, or Opacus is not installed.
    """

    def cost(noise: float) -> float:
        return spent(noise=noise, sampling_rate=sampling_rate, rounds=rounds, delta=delta)

    if cost(_MAX_NOISE) > epsilon:
        raise ValueError(
            f"privacy.epsilon must be reachable in {rounds} rounds, got {epsilon:g}; noise of "
            f"{_MAX_NOISE:g} times the clip still costs {cost(_MAX_NOISE):.2g}"
        )
    low, high = _MIN_NOISE, _MAX_NOISE
    while high - low > 0.0005 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle) > epsilon else (low, middle)
    return high


def affordable_rounds(
    *, epsilon: float, noise: float, sampling_rate: float, rounds: int, delta: float
) -> int:
    """Return how many rounds, ``rounds`` at most, cost no more than ``epsilon``."""
    low, high = 0, rounds
    while low < high:
        middle = (low + high + 1) // 2
        cost = spent(noise=noise, sampling_rate=sampling_rate, rounds=middle, delta=delta)
        low, high = (middle, high) if cost <= epsilon else (low, middle - 1)
    return low
