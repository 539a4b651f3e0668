"""A budget of grafts over layers, against trying every way to spend it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from orchard.experts.allocation import allocate


@pytest.mark.parametrize("seed", range(20))
def test_the_sum_of_losses_is_the_smallest(seed: int) -> None:
    generator = np.random.default_rng(seed)
    losses = [{number: float(generator.integers(1, 9)) for number in range(1, 5)} for _ in range(4)]
    for budget in range(4, 17):
        ways = [
            numbers
            for numbers in itertools.product(range(1, 5), repeat=4)
            if sum(numbers) <= budget
        ]
        expected = min(
            ways,
            key=lambda numbers: (
                sum(own[number] for own, number in zip(losses, numbers, strict=True)),
                sum(numbers),
                numbers[::-1],
            ),
        )
        assert allocate(losses, budget=budget) == expected


def test_more_budget_never_loses_and_is_left_where_it_does_not_help() -> None:
    losses = [{1: 0.9, 2: 0.5, 3: 0.6}, {1: 0.3, 2: 0.2, 3: 0.1}]
    assert [allocate(losses, budget=n) for n in range(2, 7)] == [
        *((1, 1), (2, 1), (2, 2), (2, 3)),
        (2, 3),
    ]


def test_a_budget_below_one_a_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^strategy.graft_budget must be at least 2, got 1; "):
        allocate([{1: 1.0}, {1: 1.0, 2: 0.5}], budget=1)
