"""What an update may be beside the others, as numbers; ``test_hostile_updates.py`` sends them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchard.server.beside import Bounds, bounded, round_median, too_heavy
from orchard.server.checkpoint import ServerState
from orchard.server.moves import PoisonedError, check_move

NORMS = st.lists(st.floats(1.0, 9.0), min_size=2, max_size=9)


@given(norms=NORMS, factor=st.floats(1e-6, 1e6))
def test_norms_of_one_size_are_all_let_in_whatever_the_size(
    norms: list[float], factor: float
) -> None:
    found, bound = Bounds().too_long([factor * norm for norm in norms])
    assert found == []
    assert (bound > 0) == (len(norms) >= 3)


@given(norms=NORMS.filter(lambda own: len(own) > 2), at=st.integers(0, 9))
def test_a_minority_cannot_lift_the_bound(norms: list[float], at: int) -> None:
    place = at % len(norms)
    found, _ = Bounds().too_long([*norms[:place], 1e30, *norms[place:]])
    assert found == [place]


def test_two_updates_are_held_to_earlier_rounds_alone() -> None:
    assert Bounds().too_long([1.0, 1e9]) == ([], 0.0)
    assert Bounds().too_long([1.0, 1e9], [2.0, 0.5])[0] == [1]
    # What has nothing in it is no company.
    assert Bounds().too_long([1.0, 1e9, 0.0, 0.0]) == ([], 0.0)
    assert Bounds(max_norm_ratio=0.0).too_long([1.0, 1.0, 1e9])[0] == []
    assert round_median([3.0, 1.0, 2.0, 9.0]) == 2.0


def test_the_bound_itself_is_let_in() -> None:
    assert Bounds(max_norm_ratio=2.0).too_long([1.0, 1.0, 2.0]) == ([], 2.0)
    assert Bounds(max_norm_ratio=2.0).too_long([1.0, 1.0, math.nextafter(2.0, 3)])[0] == [2]


@pytest.mark.parametrize(
    ("bounds", "joined", "expected"),
    [
        (Bounds(), {"a": 24, "b": 30}, {"a": 24, "b": 30}),
        (Bounds(), {"a": 4, "b": 4, "c": 10**9}, {"a": 4, "b": 4, "c": 12}),
        (Bounds(), {"a": 4, "b": 6, "c": None}, {"a": 4, "b": 6, "c": 4}),
        (Bounds(), {"a": None}, {"a": None}),
        (Bounds(), {"a": 0, "b": 0, "c": 9}, {"a": 0, "b": 0, "c": 1}),
        (Bounds(max_examples=5), {"a": 4, "b": 6, "c": None}, {"a": 4, "b": 5, "c": 4}),
        (Bounds(max_examples=5), {"a": None}, {"a": 5}),
    ],
)
def test_a_site_counts_for_what_is_accepted(
    bounds: Bounds, joined: dict[str, int | None], expected: dict[str, int | None]
) -> None:
    assert bounds.accepted(joined) == expected


def test_only_who_never_said_is_held_to_the_others_weights() -> None:
    weights = [4.0, 4.0, 41.0]
    assert too_heavy(weights, unbounded=[True] * 3) == ([2], 12.0)
    assert too_heavy(weights, unbounded=[True, True, False])[0] == []
    assert too_heavy([4.0, 4.0, 12.0], unbounded=[True] * 3)[0] == []
    assert too_heavy([4.0, 41.0], unbounded=[True] * 2) == ([], 0.0)


def test_a_weight_is_cut_and_never_lifted() -> None:
    weights = {"a": 9.0, "b": 1.0, "c": 9.0}
    assert bounded(weights, most={"a": 4.0, "b": 4.0}) == {"a": 4.0, "b": 1.0, "c": 9.0}


def state(value: float, number: int = 0, slot: float = 0.0) -> ServerState:
    tree = {"a": torch.full((4,), value)}
    return ServerState(number, tree, {"moment": {"a": torch.full((4,), slot)}})


def test_a_tree_may_move_as_far_as_is_said() -> None:
    check_move(state(0.0), state(1.5, 1), longest=0.0, max_move=3.0)  # a norm of 3
    with pytest.raises(PoisonedError, match=r"by at most 2\.9, got 3; "):
        check_move(state(0.0), state(1.5, 1), longest=0.0, max_move=2.9)


@pytest.mark.parametrize(
    ("before", "longest", "bound"), [(0.0, 0.0, 100.0), (5.0, 0.0, 1000.0), (0.0, 7.0, 700.0)]
)
def test_by_default_a_move_is_held_to_what_is_there(
    before: float, longest: float, bound: float
) -> None:
    check_move(state(before), state(before + 0.49 * bound, 1), longest=longest)
    with pytest.raises(PoisonedError, match=r"deployment\.max_move"):
        check_move(state(before), state(before + 0.51 * bound, 1), longest=longest)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_neither_tree_nor_slots_may_be_anything_but_finite(value: float) -> None:
    for after in (state(value, 1), state(0.0, 1, slot=value)):
        with pytest.raises(PoisonedError, match="must be finite"):
            check_move(state(0.0), after, longest=1.0)


def test_a_name_that_was_not_there_is_refused() -> None:
    after = ServerState(1, {"a": torch.zeros(4), "b": torch.zeros(1)})
    with pytest.raises(PoisonedError, match="b must be a tensor of the tree before"):
        check_move(state(0.0), after, longest=1.0)
