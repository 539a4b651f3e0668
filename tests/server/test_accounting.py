"""What rounds cost, against published values and against the exact cost of a single Gaussian."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from orchard.server import accounting
from orchard.server.accounting import affordable_rounds, noise_for, spent

# Noise, batch over examples, steps, delta, and epsilon as published: TensorFlow Privacy's tutorial
# on MNIST (three rows, 60,000 examples in batches of 256); Abadi et al., 2016, arXiv:1607.00133.
PUBLISHED = (
    (1.3, 256 / 60_000, 15 * 60_000 // 256, 1e-5, 1.19),
    (1.1, 256 / 60_000, 60 * 60_000 // 256, 1e-5, 3.01),
    (0.7, 256 / 60_000, 45 * 60_000 // 256, 1e-5, 7.10),
    (4.0, 0.01, 10_000, 1e-5, 1.26),
)


@pytest.mark.parametrize(("noise", "rate", "rounds", "delta", "epsilon"), PUBLISHED)
def test_the_divergences_give_published_epsilons(
    noise: float, rate: float, rounds: int, delta: float, epsilon: float
) -> None:
    """They were turned into epsilon by Mironov, 2017, Proposition 3; today's way is tighter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants.analysis import rdp  # type: ignore[import-untyped]
    orders = accounting._ORDERS
    divergences = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=rounds, orders=orders)
    then = min(
        float(d) + math.log(1 / delta) / (order - 1)
        for order, d in zip(orders, divergences, strict=True)
    )
    assert then == pytest.approx(epsilon, abs=0.005)
    now = spent(noise=noise, sampling_rate=rate, rounds=rounds, delta=delta)
    assert 0.7 * epsilon < now < epsilon


def exact(noise: float, delta: float) -> float:
    """Return the epsilon of one Gaussian: Balle and Wang, 2018, arXiv:1805.06530, Theorem 8."""

    def excess(epsilon: float) -> float:
        first = stats.norm.cdf(0.5 / noise - epsilon * noise)
        second = math.exp(epsilon) * stats.norm.cdf(-0.5 / noise - epsilon * noise)
        return float(first - second - delta)

    return float(optimize.brentq(excess, 0.0, 100.0))


@pytest.mark.parametrize(
    ("noise", "rounds"), [(0.8, 1), (1.0, 10), (2.0, 1), (2.0, 10), (5.0, 100), (20.0, 1)]
)
def test_without_sampling_it_is_no_less_and_little_more_than_the_exact_cost(
    noise: float, rounds: int
) -> None:
    # Rounds of a Gaussian are one of a Gaussian with less noise.
    least = exact(noise / math.sqrt(rounds), 1e-6)
    found = spent(noise=noise, sampling_rate=1.0, rounds=rounds, delta=1e-6)
    assert least <= found <= 1.25 * least + 0.02


@settings(max_examples=5, deadline=None)
@given(
    epsilon=st.floats(0.3, 20.0),
    rate=st.sampled_from([0.01, 0.2, 1.0]),
    rounds=st.sampled_from([1, 20, 300]),
)
def test_the_noise_keeps_the_budget_and_a_little_less_does_not(
    epsilon: float, rate: float, rounds: int
) -> None:
    found = noise_for(epsilon=epsilon, sampling_rate=rate, rounds=rounds, delta=1e-5)

    def cost(noise: float) -> float:
        return spent(noise=noise, sampling_rate=rate, rounds=rounds, delta=1e-5)

    assert cost(found) <= epsilon < cost(0.995 * found)


def test_as_many_rounds_are_run_as_the_budget_pays_for() -> None:
    shared = {"noise": 1.5, "sampling_rate": 0.3, "delta": 1e-5}
    number = affordable_rounds(epsilon=3.0, rounds=1000, **shared)
    assert 0 < number < 1000
    assert spent(rounds=number, **shared) <= 3.0 < spent(rounds=number + 1, **shared)
    assert affordable_rounds(epsilon=1e6, rounds=7, **shared) == 7
    assert affordable_rounds(epsilon=1e-3, rounds=7, **shared) == 0


def test_no_noise_is_no_privacy_and_no_round_costs_nothing() -> None:
    assert spent(noise=0.0, sampling_rate=1.0, rounds=1, delta=1e-5) == math.inf
    assert spent(noise=0.0, sampling_rate=1.0, rounds=0, delta=1e-5) == 0.0
    with pytest.raises(ValueError, match=r"^privacy.epsilon must be reachable in 10000 rounds"):
        noise_for(epsilon=1e-6, sampling_rate=1.0, rounds=10_000, delta=1e-5)
