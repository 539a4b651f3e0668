"""What one client can change, and the noise over it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orchard.communication.messages import Update
from orchard.seeding import Seeds
from orchard.server.privacy import Noise, Protection, seeded_noise, system_noise
from orchard.strategies.strategy import Strategy, start_server, update_server

SHARED = {"a": torch.zeros(40, 25), "b": torch.zeros(7)}
SOURCES = [seeded_noise(Seeds(3)), system_noise]


def protection(draw: Noise = system_noise, **given: float) -> Protection:
    chosen = {"noise": 0.0, "clip": 2.0, "expected": 4.0, "quantile": 0.0, **given}
    return Protection(**chosen, draw=draw)


def update(delta: dict[str, torch.Tensor], client: str = "x") -> Update:
    return Update(client, 1, delta, dict.fromkeys(delta, 1e6), {})


def norm(tree: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tree.values()))


@given(
    size=st.floats(0.0, 1e30),
    missing=st.sampled_from(["", "a", "b"]),
    other=st.floats(0.0, 10.0),
    seed=st.integers(0, 9),
)
def test_a_client_changes_the_mean_by_at_most_the_clip_over_the_expected_number(
    size: float, missing: str, other: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    honest = update(
        {n: other * torch.randn(t.shape, generator=generator) for n, t in SHARED.items()}
    )
    sent = {
        n: size * torch.randn(t.shape, generator=generator)
        for n, t in SHARED.items()
        if n != missing
    }
    with_it, _ = protection().aggregate([honest, update(sent)], SHARED, {}, round_number=1)
    without, _ = protection().aggregate([honest], SHARED, {}, round_number=1)
    assert norm({n: with_it[n] - without[n] for n in SHARED}) <= 2.0 / 4.0 * (1 + 1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_in_the_sum(bad: float) -> None:
    sent = {n: torch.full_like(t, bad) for n, t in SHARED.items()}
    found, _ = protection().aggregate([update(sent)], SHARED, {}, round_number=1)
    assert norm(found) == 0.0


def test_an_update_below_the_norm_is_averaged_over_the_expected_number() -> None:
    sent = {"a": torch.full((40, 25), 0.01)}
    found, _ = protection().aggregate([update(sent)] * 2, SHARED, {}, round_number=1)
    torch.testing.assert_close(found["a"], torch.full((40, 25), 0.01 * 2 / 4))
    assert norm({"b": found["b"]}) == 0.0


@pytest.mark.parametrize("draw", SOURCES)
def test_the_noise_is_normal_and_of_the_stated_deviation_whoever_takes_part(draw: Noise) -> None:
    shared = {"a": torch.zeros(200, 200), "b": torch.zeros(3)}
    expected = 1.5 * 2.0 / 4.0
    for updates in ([], [update({"b": torch.ones(3)})]):
        found, _ = protection(draw, noise=1.5).aggregate(updates, shared, {}, round_number=2)
        values = found["a"].flatten().double() / expected
        assert stats.kstest(values.numpy(), "norm").pvalue > 1e-4
        # 40,000 values: their deviation is within 2 % but once in 10**8.
        assert float(values.std()) == pytest.approx(1.0, rel=0.02)


def test_seeded_noise_repeats_and_the_systems_does_not() -> None:
    for draw, repeats in zip(SOURCES, (True, False), strict=True):
        one, other = draw(4, "a", (50,)), draw(4, "a", (50,))
        assert torch.equal(one, other) == repeats
        assert not torch.equal(one, draw(5, "a", (50,)))
        assert not torch.equal(one, draw(4, "b", (50,)))
        assert draw(4, "a", (3, 5)).shape == (3, 5)
        assert draw(4, "a", ()).shape == ()


def test_the_norm_follows_the_quantile_of_the_clients() -> None:
    own = protection(clip=50.0, expected=20.0, quantile=0.5)
    lengths = [0.1 * (1 + i) for i in range(20)]  # half of them are at most 1
    updates = [update({"b": torch.tensor([length] + 6 * [0.0])}) for length in lengths]
    slots: dict[str, dict[str, torch.Tensor]] = {}
    norms = []
    for number in range(1, 101):
        _, slots = own.aggregate(updates, SHARED, slots, round_number=number)  # type: ignore[assignment]
        norms.append(float(slots["privacy"]["clip"]))
    assert norms[0] < 50.0
    assert sum(norms[-20:]) / 20 == pytest.approx(1.05, abs=0.3)


def test_sum_and_count_together_reveal_as_much_as_the_stated_noise() -> None:
    own = protection(noise=1.2, expected=100.0, quantile=0.5)
    # Noises of two independent queries add up as the inverse squares; the count is halved.
    together = own.sum_noise**-2 + (2 * own.count_noise) ** -2
    assert together == pytest.approx(1.2**-2)
    with pytest.raises(ValueError, match=r"^privacy.clip_quantile must be 0 with 4 clients"):
        _ = protection(noise=1.2, quantile=0.5).sum_noise


def test_the_server_moves_in_a_round_without_any_client() -> None:
    strategy = Strategy(protection=protection(seeded_noise(Seeds(1)), noise=1.0))
    state = start_server(strategy, SHARED)
    moved = update_server(strategy, state, [])
    assert moved.round_number == 1
    assert norm({n: moved.shared[n] - state.shared[n] for n in SHARED}) > 0
