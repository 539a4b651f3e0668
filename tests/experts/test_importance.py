"""Importance and usage of experts, read from the router."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchard.experts.importance import (
    RANKS,
    ImportanceSettings,
    LayerImportance,
    MeanImportance,
    UsageMeter,
    layer_importance,
)

PAPER = ImportanceSettings()
LAYER_0 = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.1, 0.4]]
LAYER_1 = [[0.2, 0.2, 0.6], [0.3, 0.3, 0.4], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]
FIELDS = [field.name for field in dataclasses.fields(LayerImportance)]

seeds = st.integers(0, 2**32 - 1)
tokens = st.integers(1, 40)
experts = st.integers(1, 12)


def route(seed: int, num_tokens: int, num_experts: int) -> Tensor:
    """Draw probabilities; some are exactly 0, as a softmax in float32 underflows to."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, num_experts, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -200.0
    return logits.softmax(dim=-1)


def choose(probabilities_TE: Tensor, k: int) -> Tensor:
    return probabilities_TE.topk(min(k, probabilities_TE.shape[1]), dim=-1).indices


def reference(
    G: np.ndarray, lam: float = 0.9, beta: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Score as the formulas stand, in float64: mean(p log(p / mean(p)))."""
    cumulative, specific = G.mean(0), G.max(0)
    combined = lam * cumulative + (1 - lam) * specific
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = np.where(G > 0, G * np.log(G / np.maximum(cumulative, 1e-300)), 0.0).mean(0)
    return cumulative, specific, combined, divergence, combined - beta * divergence


def assert_same(first: LayerImportance, second: LayerImportance, atol: float = 1e-6) -> None:
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(first, name), getattr(second, name), atol=atol, rtol=0, msg=name
        )


@pytest.mark.parametrize(
    ("rows", "combined", "divergence", "information"),
    [
        (
            LAYER_0,
            [0.4975, 0.395, 0.1975],
            [0.070359, 0.094475, 0.040697],
            [0.490464, 0.385553, 0.193430],
        ),
        (LAYER_1, [0.2325, 0.375, 0.4425], None, [0.230801, 0.372025, 0.441152]),
    ],
)
def test_the_worked_example_of_the_reconstruction(
    rows: list[list[float]],
    combined: list[float],
    divergence: list[float] | None,
    information: list[float],
) -> None:
    result = layer_importance(torch.tensor(rows), PAPER)
    assert result.combined_E.tolist() == pytest.approx(combined, abs=1e-6)
    assert result.information_E.tolist() == pytest.approx(information, abs=1e-6)
    if divergence is not None:
        assert result.divergence_E.tolist() == pytest.approx(divergence, abs=1e-6)
        assert float(result.divergence_E.sum()) == pytest.approx(0.20553, abs=1e-5)


@settings(deadline=None)
@given(seeds, tokens, experts)
def test_divergence_sums_to_the_mutual_information_of_expert_and_token(
    seed: int, num_tokens: int, num_experts: int
) -> None:
    probabilities = route(seed, num_tokens, num_experts)
    joint = probabilities.double() / num_tokens
    independent = joint.sum(dim=0, keepdim=True) * joint.sum(dim=1, keepdim=True)
    information = torch.where(joint > 0, joint * (joint / independent).log(), 0.0).sum()
    divergence = layer_importance(probabilities, PAPER).divergence_E.sum()
    assert float(divergence) == pytest.approx(float(information), abs=1e-6)


@settings(deadline=None)
@given(seeds, tokens, experts, st.floats(0, 1), st.floats(0, 2))
def test_scores_agree_with_the_formulas_as_they_stand(
    seed: int, num_tokens: int, num_experts: int, weight: float, beta: float
) -> None:
    probabilities = route(seed, num_tokens, num_experts)
    settings = ImportanceSettings(cumulative_weight=weight, beta=beta)
    result = layer_importance(probabilities, settings)
    for name, expected in zip(
        FIELDS, reference(probabilities.double().numpy(), weight, beta), strict=True
    ):
        found = getattr(result, name)
        assert found.dtype == torch.float32
        assert found.shape == (num_experts,)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6, err_msg=name)


@settings(deadline=None)
@given(seeds, tokens, experts)
def test_divergence_is_never_negative(seed: int, num_tokens: int, num_experts: int) -> None:
    assert (layer_importance(route(seed, num_tokens, num_experts), PAPER).divergence_E >= 0).all()


@settings(deadline=None)
@given(seeds, experts, st.integers(1, 5000))
def test_tokens_that_are_all_alike_diverge_by_nothing(
    seed: int, num_experts: int, num_tokens: int
) -> None:
    probabilities = route(seed, 1, num_experts).expand(num_tokens, num_experts)
    result = layer_importance(probabilities, PAPER)
    assert float(result.divergence_E.max()) <= 1e-7
    torch.testing.assert_close(result.combined_E, probabilities[0], atol=1e-6, rtol=0)


def test_a_probability_of_zero_counts_zero() -> None:
    result = layer_importance(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), PAPER)
    half = 0.5 * math.log(2)
    assert result.divergence_E.tolist() == pytest.approx([half, half, 0.0])
    assert result.information_E.tolist() == pytest.approx([0.55 - 0.1 * half] * 2 + [0.0])


@settings(deadline=None)
@given(seeds, tokens, experts)
def test_permuting_experts_permutes_the_scores(
    seed: int, num_tokens: int, num_experts: int
) -> None:
    probabilities = route(seed, num_tokens, num_experts)
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed ^ 1))
    result, permuted = (
        layer_importance(p, PAPER) for p in (probabilities, probabilities[:, order])
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(permuted, name), getattr(result, name)[order])


@settings(deadline=None)
@given(seeds, tokens, experts, st.sampled_from(["token", "sample"]), st.booleans())
def test_the_order_of_tokens_does_not_matter(
    seed: int, num_tokens: int, num_experts: int, level: str, is_masked: bool
) -> None:
    settings = ImportanceSettings(level=level, softmax="top_k" if is_masked else "full")
    probabilities = route(seed, num_tokens, num_experts)
    choices = choose(probabilities, 2)
    sample = torch.arange(num_tokens) // 3
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed ^ 1))
    result = layer_importance(probabilities, settings, choices_TK=choices, sample_T=sample)
    shuffled = layer_importance(
        probabilities[order], settings, choices_TK=choices[order], sample_T=sample[order]
    )
    assert_same(result, shuffled, atol=1e-7)


@settings(deadline=None)
@given(seeds, tokens, tokens, experts)
def test_a_batch_of_two_batches_has_their_mean_and_their_maximum(
    seed: int, num_first: int, num_second: int, num_experts: int
) -> None:
    first, second = route(seed, num_first, num_experts), route(seed + 1, num_second, num_experts)
    one, two, both = (
        layer_importance(p, PAPER) for p in (first, second, torch.cat([first, second]))
    )
    share = num_first / (num_first + num_second)
    torch.testing.assert_close(
        both.cumulative_E, share * one.cumulative_E + (1 - share) * two.cumulative_E
    )
    torch.testing.assert_close(both.specific_E, torch.maximum(one.specific_E, two.specific_E))
    mixed = share * one.divergence_E + (1 - share) * two.divergence_E
    assert (both.divergence_E >= mixed - 1e-6).all()  # the means differ as well


@settings(deadline=None)
@given(seeds, tokens, experts)
def test_repeating_a_batch_changes_nothing(seed: int, num_tokens: int, num_experts: int) -> None:
    once = route(seed, num_tokens, num_experts)
    assert_same(layer_importance(once, PAPER), layer_importance(once.repeat(3, 1), PAPER))


@settings(deadline=None)
@given(seeds, tokens, experts, st.integers(1, 4))
def test_probabilities_outside_the_choices_only_lower_a_score(
    seed: int, num_tokens: int, num_experts: int, k: int
) -> None:
    probabilities = route(seed, num_tokens, num_experts)
    choices = choose(probabilities, k)
    full = layer_importance(probabilities, PAPER, choices_TK=choices)
    masked = layer_importance(
        probabilities, ImportanceSettings(softmax="top_k"), choices_TK=choices
    )
    for name in ("cumulative_E", "specific_E", "combined_E"):
        assert (getattr(masked, name) <= getattr(full, name) + 1e-7).all()
    kept = torch.zeros_like(probabilities)
    for token, chosen in enumerate(choices.tolist()):
        kept[token, chosen] = probabilities[token, chosen]
    assert_same(masked, layer_importance(kept, PAPER))


def test_all_experts_chosen_is_the_full_softmax() -> None:
    probabilities = route(0, 20, 5)
    masked = layer_importance(
        probabilities, ImportanceSettings(softmax="top_k"), choices_TK=choose(probabilities, 5)
    )
    assert_same(masked, layer_importance(probabilities, PAPER), atol=0)


def test_a_token_beyond_capacity_has_no_expert() -> None:
    probabilities = torch.tensor([[0.75, 0.25], [0.6, 0.4]])
    result = layer_importance(
        probabilities, ImportanceSettings(softmax="top_k"), choices_TK=torch.tensor([[0], [2]])
    )
    assert result.cumulative_E.tolist() == [0.375, 0.0]
    assert result.specific_E.tolist() == [0.75, 0.0]


def test_a_sample_is_the_mean_of_its_tokens() -> None:
    probabilities = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    sample = torch.tensor([7, 7, 2])  # numbers neither start at 0 nor follow each other
    result = layer_importance(probabilities, ImportanceSettings(level="sample"), sample_T=sample)
    assert_same(result, layer_importance(torch.tensor([[0.75, 0.25], [0.0, 1.0]]), PAPER))


@settings(deadline=None)
@given(seeds, tokens, experts)
def test_samples_of_one_token_are_tokens(seed: int, num_tokens: int, num_experts: int) -> None:
    probabilities = route(seed, num_tokens, num_experts)
    sample = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    by_sample = layer_importance(probabilities, ImportanceSettings(level="sample"), sample_T=sample)
    assert_same(by_sample, layer_importance(probabilities, PAPER), atol=1e-7)


def test_scores_are_float32_and_carry_no_gradient() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        result = layer_importance(logits.softmax(dim=-1).to(dtype), PAPER)
        for name in FIELDS:
            assert getattr(result, name).dtype == torch.float32
            assert not getattr(result, name).requires_grad


def test_inputs_stay_as_they_are() -> None:
    probabilities = route(0, 9, 4)
    kept = probabilities.clone()
    settings = ImportanceSettings(level="sample", softmax="top_k")
    choices, sample = choose(probabilities, 2), torch.arange(9) // 4
    layer_importance(probabilities, settings, choices_TK=choices, sample_T=sample)
    assert torch.equal(probabilities, kept)


def test_a_selection_ranks_by_one_of_four() -> None:
    result = layer_importance(torch.tensor(LAYER_0), PAPER)
    expected = [
        result.information_E,
        result.combined_E,
        result.cumulative_E,
        result.specific_E,
    ]
    for kind, scores in zip(RANKS, expected, strict=True):
        assert result.ranked_by(kind) is scores
    with pytest.raises(ValueError, match=r"^rank must be one of information, .* got size$"):
        result.ranked_by("size")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cumulative_weight": 1.1}, r"^cumulative_weight must be in \[0, 1\], got 1\.1"),
        ({"cumulative_weight": math.nan}, r"^cumulative_weight must be in \[0, 1\], got nan"),
        ({"beta": -0.1}, r"^beta must be a finite number of at least 0, got -0\.1"),
        ({"beta": math.inf}, r"^beta must be a finite number of at least 0, got inf"),
        ({"level": "batch"}, r"^level must be one of token, sample, got batch"),
        ({"softmax": "top"}, r"^softmax must be one of full, top_k, got top"),
    ],
)
def test_a_setting_out_of_range_is_an_error(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImportanceSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4), (3, 0)])
def test_no_token_or_no_expert_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^probabilities_TE must have at least one token"):
        layer_importance(torch.zeros(shape), PAPER)


def test_what_a_setting_needs_must_be_given() -> None:
    probabilities = route(0, 3, 4)
    with pytest.raises(ValueError, match=r"^sample_T must be given for level = sample"):
        layer_importance(probabilities, ImportanceSettings(level="sample"))
    with pytest.raises(ValueError, match=r"^choices_TK must be given for softmax = top_k"):
        layer_importance(probabilities, ImportanceSettings(softmax="top_k"))
    with pytest.raises(ValueError, match=r"^sample_T must have one number for each of the 3"):
        layer_importance(probabilities, PAPER, sample_T=torch.arange(4))
    with pytest.raises(ValueError, match=r"^choices_TK must have one row for each of the 3"):
        layer_importance(probabilities, PAPER, choices_TK=torch.zeros(2, 2, dtype=torch.int64))


def test_mean_importance_gives_every_batch_the_same_weight() -> None:
    batches = [[route(b, 5 + 20 * b, 4), route(b + 9, 5 + 20 * b, 3)] for b in range(3)]
    mean = MeanImportance()
    scored = [[layer_importance(p, PAPER) for p in batch] for batch in batches]
    for layers in scored:
        mean.add(layers)
    for index, found in enumerate(mean.mean()):
        expected = torch.stack([layers[index].combined_E for layers in scored]).mean(dim=0)
        torch.testing.assert_close(found, expected)
        assert found.dtype == torch.float32


def test_mean_importance_checks_what_it_gets() -> None:
    mean = MeanImportance()
    with pytest.raises(ValueError, match=r"^importance must be of at least one batch, got none"):
        mean.mean()
    mean.add([layer_importance(torch.tensor(LAYER_0), PAPER)] * 2)
    with pytest.raises(ValueError, match=r"^importance must cover 2 MoE layers .* got 1"):
        mean.add([layer_importance(torch.tensor(LAYER_0), PAPER)])


def meter(
    probabilities: Tensor, choices: Tensor, sample: Tensor, *, cuts: tuple[int, ...] = ()
) -> UsageMeter:
    result = UsageMeter([probabilities.shape[1]])
    ends = (*cuts, len(probabilities))
    for start, end in zip((0, *cuts), ends, strict=True):
        part = slice(start, end)
        result.add(0, probabilities[part], choices_TK=choices[part], sample_T=sample[part])
    return result


def test_usage_by_hand() -> None:
    layer_0 = torch.tensor(LAYER_0)
    result = meter(layer_0, layer_0.argmax(dim=1, keepdim=True), torch.tensor([0, 0, 1, 1]))
    (mean,), (hits,), (relative,) = map(result.usage, ("softmax_mean", "hit_rate", "relative"))
    assert mean.tolist() == pytest.approx([0.475, 0.35, 0.175])
    assert hits.tolist() == [1.0, 0.5, 0.0]
    assert relative.tolist() == pytest.approx([1.0, 0.35 / 0.475, 0.175 / 0.475])
    assert {u.dtype for u in (mean, hits, relative)} == {torch.float32}


@settings(deadline=None)
@given(seeds, st.integers(1, 8), st.integers(1, 5), experts, st.integers(1, 3))
def test_usage_agrees_with_counting(
    seed: int, num_samples: int, length: int, num_experts: int, k: int
) -> None:
    num_tokens = num_samples * length
    probabilities = route(seed, num_tokens, num_experts)
    choices = choose(probabilities, k)
    sample = torch.arange(num_tokens) // length
    hits = [
        sum(any(expert in row for row in choices[sample == s].tolist()) for s in range(num_samples))
        / num_samples
        for expert in range(num_experts)
    ]
    result = meter(probabilities, choices, sample)
    assert result.usage("hit_rate")[0].tolist() == pytest.approx(hits)
    mean = probabilities.double().mean(dim=0)
    assert result.usage("softmax_mean")[0].tolist() == pytest.approx(mean.tolist(), abs=1e-7)
    assert float(result.usage("softmax_mean")[0].sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(result.usage("relative")[0].max()) == 1.0


@settings(deadline=None)
@given(seeds, st.integers(2, 8), st.integers(1, 5), st.data())
def test_cutting_between_samples_changes_no_usage(
    seed: int, num_samples: int, length: int, data: st.DataObject
) -> None:
    probabilities = route(seed, num_samples * length, 6)
    choices, sample = choose(probabilities, 2), torch.arange(num_samples * length) // length
    cut = length * data.draw(st.integers(1, num_samples - 1))
    whole, parts = (
        meter(probabilities, choices, sample),
        meter(
            probabilities,
            choices,
            sample % 2,
            cuts=tuple(range(2 * length, len(sample), 2 * length)),
        ),
    )
    cut_once = meter(probabilities, choices, sample, cuts=(cut,))
    for mode in ("softmax_mean", "hit_rate", "relative"):
        torch.testing.assert_close(whole.usage(mode), cut_once.usage(mode))
        torch.testing.assert_close(whole.usage(mode), parts.usage(mode))


def test_the_same_number_in_two_batches_is_two_samples() -> None:
    result = UsageMeter([2])
    for chosen in (0, 1):
        result.add(
            0,
            torch.tensor([[0.5, 0.5]]),
            choices_TK=torch.tensor([[chosen]]),
            sample_T=torch.tensor([0]),
        )
    assert result.usage("hit_rate")[0].tolist() == [0.5, 0.5]


def test_none_is_no_expert_that_was_used() -> None:
    probabilities = torch.full((2, 3), 1 / 3)
    result = meter(probabilities, torch.tensor([[0, 3], [3, 3]]), torch.tensor([0, 1]))
    assert result.usage("hit_rate")[0].tolist() == [0.5, 0.0, 0.0]


def test_layers_may_differ_in_experts_and_tokens() -> None:
    result = UsageMeter([2, 3])
    for index, (num_tokens, num_experts) in enumerate([(4, 2), (7, 3)]):
        probabilities = route(index, num_tokens, num_experts)
        result.add(
            index,
            probabilities,
            choices_TK=choose(probabilities, 1),
            sample_T=torch.zeros(num_tokens, dtype=torch.int64),
        )
    assert [len(u) for u in result.usage("softmax_mean")] == [2, 3]


def test_a_meter_checks_what_it_gets() -> None:
    result = UsageMeter([3, 3])
    probabilities, sample = route(0, 4, 3), torch.zeros(4, dtype=torch.int64)
    choices = choose(probabilities, 1)
    with pytest.raises(ValueError, match=r"^usage of MoE layer 0 must be of at least one batch"):
        result.usage("softmax_mean")
    result.add(0, probabilities, choices_TK=choices, sample_T=sample)
    with pytest.raises(ValueError, match=r"^usage of MoE layer 1 must be of at least one batch"):
        result.usage("hit_rate")
    with pytest.raises(ValueError, match=r"^usage must be one of softmax_mean, .* got mean$"):
        result.usage("mean")
    with pytest.raises(ValueError, match=r"^probabilities_TE of MoE layer 1 must have 3 columns"):
        result.add(1, route(0, 4, 2), choices_TK=choices, sample_T=sample)
    with pytest.raises(ValueError, match=r"^probabilities_TE must have at least one token"):
        result.add(1, probabilities[:0], choices_TK=choices[:0], sample_T=sample[:0])
    with pytest.raises(ValueError, match=r"^sample_T must have one number"):
        result.add(1, probabilities, choices_TK=choices, sample_T=sample[:2])
