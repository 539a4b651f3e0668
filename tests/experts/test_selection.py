"""Which experts are trained under a budget, which are sent, and what a router weighs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchard.experts.importance import ImportanceSettings, UsageMeter, layer_importance
from orchard.experts.selection import (
    ExpertMask,
    all_experts,
    num_selected,
    passing,
    preference,
    random_ranks,
    select_experts,
    union_of_choices,
)
from orchard.server.aggregation import WeightedMean

PROBABILITIES = (
    torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4]]),
    torch.tensor([[0.2, 0.2, 0.6], [0.3, 0.3, 0.4], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]),
)
LAYERS = [layer_importance(p, ImportanceSettings()) for p in PROBABILITIES]
RANK = [layer.information_E for layer in LAYERS]
UNION = union_of_choices([p.topk(1, dim=-1).indices for p in PROBABILITIES], [3, 3])
USAGE = (
    [torch.tensor([0.475, 0.35, 0.175]), torch.tensor([0.225, 0.35, 0.425])],
    [torch.tensor([0.9, 0.06, 0.04]), torch.tensor([0.02, 0.03, 0.95])],
)
IMPORTANCE = (
    [LAYERS[0].combined_E, LAYERS[1].combined_E],
    [LAYERS[1].combined_E, LAYERS[0].combined_E],
)


def chosen(mask: ExpertMask) -> set[tuple[int, int]]:
    return {(la, e) for la, row in enumerate(mask) for e, is_in in enumerate(row.tolist()) if is_in}


def masks(rows: Sequence[Sequence[bool]]) -> ExpertMask:
    return tuple(torch.tensor(row, dtype=torch.bool) for row in rows)


def reference(
    rank: Sequence[Sequence[float]], union: Sequence[Sequence[bool]], budget: int
) -> set[tuple[int, int]]:
    """The procedure as the paper tells it, one expert after another."""
    candidates = [
        [(-score, layer, expert) for expert, score in enumerate(row) if union[layer][expert]]
        for layer, row in enumerate(rank)
    ]
    heads = sorted(min(row) for row in candidates if row)
    selected = heads[:budget]
    for candidate in sorted(c for row in candidates for c in row):
        if len(selected) < budget and candidate not in selected:
            selected.append(candidate)
    return {(layer, expert) for _, layer, expert in selected}


def numpy_reference(rank: np.ndarray, union: np.ndarray, budget: int) -> np.ndarray:
    """Select for layers of one size, where no two ranks are equal."""
    num_layers = len(rank)
    scores = np.where(union, rank, -np.inf)
    active = np.zeros(rank.shape, bool)
    heads = sorted(
        ((scores[la].max(), la, int(scores[la].argmax())) for la in range(num_layers)),
        reverse=True,
    )
    for value, layer, expert in heads[:budget]:
        if np.isfinite(value):
            active[layer, expert] = True
    for index in np.argsort(-scores, axis=None, kind="stable"):
        if active.sum() >= budget or not np.isfinite(scores.flat[index]):
            break
        active.flat[index] = True
    return active


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]]]:
    """Draw layers of different sizes; few distinct ranks, so that many are equal."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    few = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75])
    rank = [draw(st.lists(few, min_size=n, max_size=n)) for n in sizes]
    return rank, [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in sizes]


def select(
    problem: tuple[list[list[float]], list[list[bool]]], budget: int
) -> set[tuple[int, int]]:
    rank, union = problem
    return chosen(select_experts([torch.tensor(row) for row in rank], masks(union), budget))


def test_the_union_of_the_worked_example() -> None:
    assert [row.tolist() for row in UNION] == [[True, True, False], [False, True, True]]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, set()),
        (1, {(0, 0)}),
        (2, {(0, 0), (1, 2)}),
        (3, {(0, 0), (1, 2), (0, 1)}),
        (4, {(0, 0), (0, 1), (1, 1), (1, 2)}),
        (5, {(0, 0), (0, 1), (1, 1), (1, 2)}),
        (100, {(0, 0), (0, 1), (1, 1), (1, 2)}),
    ],
)
def test_the_selection_of_the_worked_example(budget: int, expected: set[tuple[int, int]]) -> None:
    assert chosen(select_experts(RANK, UNION, budget)) == expected


def test_coverage_comes_before_rank() -> None:
    rank = [torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.1, 0.2])]
    everything = all_experts([3, 2])
    assert chosen(select_experts(rank, everything, 2)) == {(0, 0), (1, 1)}
    assert chosen(select_experts(rank, everything, 3)) == {(0, 0), (1, 1), (0, 1)}


@settings(deadline=None)
@given(problems(), st.integers(0, 32))
def test_selection_agrees_with_the_procedure_as_told(
    problem: tuple[list[list[float]], list[list[bool]]], budget: int
) -> None:
    assert select(problem, budget) == reference(*problem, budget)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6), st.integers(0, 32))
def test_selection_agrees_with_numpy_for_layers_of_one_size(
    seed: int, num_layers: int, num_experts: int, budget: int
) -> None:
    generator = np.random.default_rng(seed)
    rank = generator.permutation(num_layers * num_experts).reshape(num_layers, num_experts) / 7
    union = generator.random(rank.shape) < 0.6
    found = select_experts(list(torch.from_numpy(rank)), list(torch.from_numpy(union)), budget)
    np.testing.assert_array_equal(torch.stack(found).numpy(), numpy_reference(rank, union, budget))


@settings(deadline=None)
@given(problems())
def test_budgets_are_kept_nested_and_used(
    problem: tuple[list[list[float]], list[list[bool]]],
) -> None:
    _, union = problem
    candidates = chosen(masks(union))
    covered = sum(any(row) for row in union)
    smaller: set[tuple[int, int]] = set()
    for budget in range(len(candidates) + 3):
        selected = select(problem, budget)
        assert len(selected) == min(budget, len(candidates))
        assert smaller <= selected <= candidates
        if budget >= len(union):
            assert len({layer for layer, _ in selected}) == covered
        elif budget <= covered:
            assert len({layer for layer, _ in selected}) == budget
        smaller = selected


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 16))
def test_permuting_experts_permutes_the_selection(seed: int, budget: int) -> None:
    generator = np.random.default_rng(seed)
    sizes = [4, 6, 3]
    rank = random_ranks(all_experts(sizes), generator)
    union = tuple(torch.from_numpy(generator.random(size) < 0.7) for size in sizes)
    orders = [torch.from_numpy(generator.permutation(size)) for size in sizes]
    selected = select_experts(rank, union, budget)
    permuted = select_experts(
        [r[o] for r, o in zip(rank, orders, strict=True)],
        [u[o] for u, o in zip(union, orders, strict=True)],
        budget,
    )
    for before, after, order in zip(selected, permuted, orders, strict=True):
        assert torch.equal(after, before[order])


def test_of_equal_ranks_the_earlier_layer_and_the_lower_index_come_first() -> None:
    rank = [torch.zeros(3), torch.zeros(2)]
    expected = [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)]
    for budget in range(6):
        assert chosen(select_experts(rank, all_experts([3, 2]), budget)) == set(expected[:budget])


def test_what_is_no_candidate_may_have_any_rank() -> None:
    rank = [torch.tensor([math.nan, 0.1, math.inf])]
    assert chosen(select_experts(rank, masks([[False, True, False]]), 3)) == {(0, 1)}


def test_a_negative_rank_is_a_rank() -> None:
    assert chosen(select_experts([torch.tensor([-2.0, -1.0])], all_experts([2]), 1)) == {(0, 1)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_rank_that_is_not_finite_is_an_error(value: float) -> None:
    rank = [torch.zeros(2), torch.tensor([0.0, value])]
    with pytest.raises(ValueError, match=r"^rank must be finite, .* in MoE layer 1; "):
        select_experts(rank, all_experts([2, 2]), 1)


def test_arguments_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^budget must be at least 0, got -1; "):
        select_experts(RANK, UNION, -1)
    expected = "union must have the shapes of rank, [(3,), (3,)], got [(3,)]; "
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
        select_experts(RANK, UNION[:1], 2)
    with pytest.raises(ValueError, match=r"^importance must have the shapes of usage, "):
        preference(USAGE[0], IMPORTANCE[0][:1], UNION)
    with pytest.raises(ValueError, match=r"^passed must have the shapes of usage, "):
        preference(USAGE[0], IMPORTANCE[0], UNION[:1])
    with pytest.raises(ValueError, match=r"^trained must have the shapes of usage, "):
        passing(USAGE[0], 1.0, UNION[:1])


def test_the_union_leaves_out_tokens_without_an_expert() -> None:
    union = union_of_choices([torch.tensor([[3, 1], [3, 3]]), torch.tensor([[0], [1]])], [3, 2])
    assert [row.tolist() for row in union] == [[False, True, False], [True, True]]


def test_counts() -> None:
    assert num_selected(all_experts([3, 5])) == 8
    assert num_selected(UNION) == 4
    assert num_selected(()) == 0


def test_random_ranks_depend_on_the_generator_alone() -> None:
    first, again, empty = (
        random_ranks(union, np.random.default_rng(3))
        for union in (all_experts([4, 2]), all_experts([4, 2]), masks([[False] * 4, [False] * 2]))
    )
    other = random_ranks(all_experts([4, 2]), np.random.default_rng(4))
    assert [len(row) for row in first] == [4, 2]
    for a, b, c, d in zip(first, again, empty, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert not torch.equal(a, d)
        assert ((a >= 0) & (a < 1)).all()


def test_random_ranks_favor_no_expert() -> None:
    generator, union = np.random.default_rng(0), masks([[True] * 4, [True, True, False, True]])
    counts = torch.zeros(2, 4)
    for _ in range(2000):
        counts += torch.stack(select_experts(random_ranks(union, generator), union, 2))
    expected = torch.tensor([[500.0] * 4, [2000 / 3, 2000 / 3, 0.0, 2000 / 3]])
    assert (counts - expected).abs().max() < 100  # five standard deviations
    assert counts[1, 2] == 0


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.05, [[1.75, 1.75, 1.0], [1.0, 1.0, 1.75]]),
        (0.2, [[1.75, 1.0, 0.0], [1.0, 1.0, 1.75]]),  # nobody sends (0, 2): it keeps its value
    ],
)
def test_experts_that_pass_average_as_in_the_worked_example(
    tau: float, expected: list[list[float]]
) -> None:
    sums = WeightedMean()
    for client, usage in enumerate(USAGE):
        names = [f"{la}.{e}" for la, e in sorted(chosen(passing(usage, tau * 3)))]
        values = {name: torch.tensor([client + 1.0]) for name in names}
        sums.add(values, dict.fromkeys(names, (100.0, 300.0)[client]))
    old = {f"{la}.{e}": torch.zeros(1) for la in range(2) for e in range(3)}
    new = {**old, **sums.mean()}
    assert [[float(new[f"{la}.{e}"]) for e in range(3)] for la in range(2)] == expected


def test_router_weights_of_the_worked_example() -> None:
    passed = [passing(usage, 0.05 * 3) for usage in USAGE]
    everywhere = tuple(a | b for a, b in zip(*passed, strict=True))
    assert [num_selected(p) / num_selected(everywhere) for p in passed] == [1.0, 0.5]  # Eq. 18
    preferences = [preference(*args) for args in zip(USAGE, IMPORTANCE, passed, strict=True)]
    raw = [p / num_selected(everywhere) for p in preferences]  # Eq. 20
    assert raw == pytest.approx([0.130125, 0.069896], abs=1e-6)
    normalized = [p / sum(preferences) for p in preferences]
    assert normalized == pytest.approx([0.650557, 0.349443], abs=1e-6)


def test_preference_of_layers_of_different_sizes() -> None:
    usage = [torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.3, 0.5])]
    importance = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])]
    passed = masks([[False, True], [True, False, True]])
    assert preference(usage, importance, passed) == pytest.approx(1.0 + 0.6 + 2.5)
    assert preference(usage, importance, masks([[False] * 2, [False] * 3])) == 0.0


@settings(deadline=None)
@given(st.integers(2, 256), st.integers(1, 300), st.integers(1, 4))
def test_uniform_routing_passes_threshold_one(
    num_experts: int, num_tokens: int, num_batches: int
) -> None:
    # What a softmax in float32 makes of equal logits is 1/E up to rounding, and so are its means.
    generator = torch.Generator().manual_seed(num_experts)
    meter = UsageMeter([num_experts])
    worst = torch.full((num_experts,), 1 / num_experts)
    for _ in range(num_batches):
        logits = torch.randn(num_tokens, 1, generator=generator).expand(num_tokens, num_experts)
        probabilities = logits.softmax(dim=-1)
        worst = torch.minimum(worst, probabilities.sum(dim=0) / num_tokens)
        meter.add(
            0,
            probabilities,
            choices_TK=torch.zeros(num_tokens, 1, dtype=torch.int64),
            sample_T=torch.zeros(num_tokens, dtype=torch.int64),
        )
    assert num_selected(passing(meter.usage("softmax_mean"), 1.0)) == num_experts
    assert num_selected(passing(meter.usage("relative"), float(num_experts))) == num_experts
    assert num_selected(passing([worst], 1.0)) == num_experts  # a mean that was summed in float32


def test_usage_below_the_tolerance_does_not_pass() -> None:
    usage = [torch.tensor([0.25, 0.25 * (1 - 1e-4), 0.25 * (1 + 1e-4), 0.25 * (1 - 1e-6)])]
    assert passing(usage, 1.0)[0].tolist() == [True, False, True, True]


def test_a_threshold_is_in_units_of_each_layers_own_size() -> None:
    usage = [torch.tensor([0.5, 0.5]), torch.tensor([0.3, 0.2, 0.3, 0.2])]
    assert [p.tolist() for p in passing(usage, 1.0)] == [[True, True], [True, False, True, False]]


def test_threshold_zero_passes_all_and_a_large_one_none() -> None:
    usage = [torch.tensor([0.0, 1.0])]
    assert passing(usage, 0.0)[0].tolist() == [True, True]
    assert passing(usage, 2.0)[0].tolist() == [False, True]
    assert passing(usage, 3.0)[0].tolist() == [False, False]


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8), st.floats(0, 4), st.floats(0, 4)
)
def test_a_higher_threshold_passes_a_part(row: list[float], first: float, second: float) -> None:
    usage: list[Tensor] = [torch.tensor(row)]
    low, high = sorted((first, second))
    assert chosen(passing(usage, high)) <= chosen(passing(usage, low))


def test_only_what_was_trained_can_pass() -> None:
    trained = masks([[True, False, True], [False, True, True]])
    passed = passing(USAGE[0], 0.2 * 3, trained)
    assert chosen(passed) == {(1, 1), (1, 2), (0, 0)}
    assert chosen(passing(USAGE[0], 0.0, trained)) == chosen(trained)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_a_threshold_out_of_range_is_an_error(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"^threshold must be a finite number .* got {threshold}"):
        passing(USAGE[0], threshold)


def test_usage_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^usage must be finite, .* in MoE layer 1; "):
        passing([torch.zeros(2), torch.tensor([math.nan, 0.5])], 1.0)
