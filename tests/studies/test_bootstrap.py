"""How far a difference is to be trusted."""

from __future__ import annotations

import numpy as np
import pytest

from orchard.seeding import Seeds
from orchard.studies.bootstrap import Interval, Pair, holm, paired_interval


def pairs_of(
    shift: float, *, seeds: int = 3, clients: int = 4, rows: int = 40, noise: float = 1.0
) -> list[list[Pair]]:
    draw = Seeds(5).generator("rows")
    made = []
    for _ in range(seeds):
        of_seed = []
        for _ in range(clients):
            weight = draw.integers(1, 9, size=rows).astype(float)
            reference = weight * draw.normal(3.0, 2.0, size=rows)
            own = reference + weight * (shift + noise * draw.normal(size=rows))
            of_seed.append(Pair(own, reference, weight))
        made.append(of_seed)
    return made


def interval_of(pairs: list[list[Pair]], *, is_shared: bool = False) -> Interval:
    return paired_interval(pairs, Seeds(0).generator("draws"), is_shared=is_shared)


@pytest.mark.parametrize("is_shared", [False, True])
def test_what_rows_have_in_common_is_paired_away(is_shared: bool) -> None:
    found = interval_of(pairs_of(0.25, noise=0.0), is_shared=is_shared)
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert not found.holds_zero
    same = interval_of(pairs_of(0.0, noise=0.0), is_shared=is_shared)
    assert same.holds_zero
    assert same.p == 1.0


def test_a_difference_beyond_its_noise_is_seen_and_one_within_is_not() -> None:
    large, none = interval_of(pairs_of(0.5)), interval_of(pairs_of(0.0))
    assert large.low > 0.3
    assert large.p < 0.01
    assert none.holds_zero
    assert none.p > 0.05


def test_the_interval_is_as_wide_as_theory_says_and_widens_with_what_clients_differ_by() -> None:
    pairs = pairs_of(0.0, seeds=1, clients=1, rows=400)
    found = interval_of(pairs)
    (pair,) = pairs[0]
    # The standard error of a ratio of means, of about 400 rows.
    residual = pair.own - pair.reference - found.mean * pair.weight
    stderr = float(np.sqrt((residual**2).sum()) / pair.weight.sum())
    assert (found.high - found.low) / (2 * 1.96 * stderr) == pytest.approx(1, abs=0.1)
    apart = [
        [
            Pair(own.own + own.weight * (i - 1.5), own.reference, own.weight)
            for i, own in enumerate(of_seed)
        ]
        for of_seed in pairs_of(0.0)
    ]
    wide, narrow = interval_of(apart), interval_of(pairs_of(0.0))
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_holm_worked_numbers() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
