"""Which experts a client trains under a budget, and which of them it sends.

HFedMoE: Resource-aware Heterogeneous Federated Learning with Mixture-of-Experts. A budget is a
number of experts in all MoE layers together:

1. only experts that the batch routes to at all (the union of its choices) are candidates;
2. every layer gets its best candidate;
3. what is left of the budget goes to the best of the rest, whichever their layers;
4. after training, an expert passes where the client used it enough, and only then is it sent;
5. a client's say in the router grows with usage times importance over the experts that passed.

Everything here is a function of a few numbers per expert. Masks lie where the scores lie.

Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Section III-D2 and Eqs. 15-20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

ExpertMask: TypeAlias = tuple[Tensor, ...]
"""One boolean tensor (E,) per MoE layer, in the order of the layers; E may differ."""

TOLERANCE = 1e-5
"""Of a threshold, relative: far above what rounding does to a mean of float32 probabilities (some
1e-7), and far below any difference in usage that means something."""


def select_experts(rank: Sequence[Tensor], union: Sequence[Tensor], budget: int) -> ExpertMask:
    """Choose the experts to train: the best of each layer, then the best of the rest.

    Of equal ranks the earlier layer comes first, then the lower index, so the result depends on
    the arguments alone. A larger budget chooses the same experts and more. There are fewer than
    ``budget`` where the union is smaller.

    Args:
        rank: Scores (E,) per layer, on one scale; higher is better.
        union: Candidates, boolean (E,) per layer; a layer without candidates gets none.
        budget: Largest number of experts over all layers, at least 0. Below the number of layers
            only the best of the layers' best are chosen.

    Raises:
        ValueError: ``budget`` is negative, shapes differ, or a candidate's rank is not finite.

    Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Section III-D2. The paper's Eq. 15 is
    the plain greedy choice; its procedure, which is what this does, covers each layer first. What
    happens to a budget below the number of layers is ours.
    """
    if budget < 0:
        raise ValueError(f"budget must be at least 0, got {budget}; give a number of experts")
    _check_layers(rank, union, names=("rank", "union"))
    candidates = [
        scores_E.detach().cpu().double().where(is_used_E.cpu(), -math.inf)
        for scores_E, is_used_E in zip(rank, union, strict=True)
    ]
    for layer, (scores_E, is_used_E) in enumerate(zip(candidates, union, strict=True)):
        if not bool(scores_E[is_used_E.cpu()].isfinite().all()):
            raise ValueError(
                f"rank must be finite, got NaN or infinity in MoE layer {layer}; "
                "check the router's probabilities"
            )
    starts = [0, *accumulate(len(scores_E) for scores_E in candidates)]
    flat = torch.cat(candidates)
    is_best = torch.zeros(len(flat), dtype=torch.bool)
    for start, scores_E in zip(starts[:-1], candidates, strict=True):
        is_best[start + int(scores_E.argmax())] = True
    # Two stable sorts: by rank, then the best of the layers before all others.
    order = flat.argsort(descending=True, stable=True)
    order = order[is_best[order].logical_not().int().argsort(stable=True)]
    order = order[flat[order] > -math.inf][:budget]
    is_chosen = torch.zeros(len(flat), dtype=torch.bool)
    is_chosen[order] = True
    return tuple(
        is_chosen[start : start + len(scores_E)].to(scores_E.device)
        for start, scores_E in zip(starts[:-1], rank, strict=True)
    )


def random_ranks(union: Sequence[Tensor], generator: np.random.Generator) -> tuple[Tensor, ...]:
    """Draw ranks (E,) per layer, uniform in [0, 1): the control for a choice by importance.

    Every expert gets a draw, so what is drawn does not depend on who is a candidate. A selection
    by these still covers each layer.
    """
    return tuple(
        torch.from_numpy(generator.random(len(is_used_E))).to(is_used_E.device)
        for is_used_E in union
    )


def union_of_choices(choices: Sequence[Tensor], num_experts: Sequence[int]) -> ExpertMask:
    """Return which experts at least one token chose.

    Args:
        choices: Each token's experts per layer, (T, K) int64 without padding; E stands for none.
        num_experts: E of each layer.

    Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Eq. 15.
    """
    masks = []
    for choices_TK, number in zip(choices, num_experts, strict=True):
        is_chosen = torch.zeros(number + 1, dtype=torch.bool, device=choices_TK.device)
        is_chosen[choices_TK.flatten()] = True
        masks.append(is_chosen[:number])
    return tuple(masks)


def all_experts(num_experts: Sequence[int]) -> ExpertMask:
    """Return the mask of all experts: a client without a budget."""
    return tuple(torch.ones(number, dtype=torch.bool) for number in num_experts)


def num_selected(mask: ExpertMask) -> int:
    """Return the number of experts in a mask."""
    return sum(int(is_chosen_E.sum()) for is_chosen_E in mask)


def passing(
    usage: Sequence[Tensor], threshold: float, trained: ExpertMask | None = None
) -> ExpertMask:
    """Return the experts that a client used enough to send them.

    An expert passes where its usage is at least ``threshold / E``. Usage equal to that passes
    although both are rounded: see ``TOLERANCE``. So under uniform routing all experts pass with
    threshold 1.

    Args:
        usage: (E,) per layer; see ``UsageMeter.usage``.
        threshold: At least 0, in units of 1/E of each layer, so that it means the same for layers
            of any size. The paper's tau is ``threshold / E``.
        trained: If given, only these experts can pass.

    Raises:
        ValueError: ``threshold`` is negative or not finite, a usage is not finite, or shapes
            differ.

    Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Eq. 17. ``trained`` is ours: in the
    paper an expert may pass that had no gradient.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be a finite number of at least 0, got {threshold}")
    for layer, usage_E in enumerate(usage):
        if not bool(usage_E.isfinite().all()):
            raise ValueError(
                f"usage must be finite, got NaN or infinity in MoE layer {layer}; "
                "check the router's probabilities"
            )
    limit = threshold * (1 - TOLERANCE)
    passed = tuple(usage_E.double() * len(usage_E) >= limit for usage_E in usage)
    if trained is None:
        return passed
    _check_layers(usage, trained, names=("usage", "trained"))
    return tuple(p & t.to(p.device) for p, t in zip(passed, trained, strict=True))


def preference(usage: Sequence[Tensor], importance: Sequence[Tensor], passed: ExpertMask) -> float:
    """Return what a client's router weighs: usage times importance, over the experts that passed.

    Routers are averaged with these as weights. Normalized over the clients it does not matter
    that Eq. 20 divides by the number of experts that passed anywhere. It is 0 where none passed.

    Args:
        usage: (E,) per layer.
        importance: (E,) per layer; see ``MeanImportance``.
        passed: See ``passing``.

    Raises:
        ValueError: Shapes differ.

    Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Eq. 19 and the numerator of Eq. 20.
    """
    _check_layers(usage, importance, names=("usage", "importance"))
    _check_layers(usage, passed, names=("usage", "passed"))
    return math.fsum(
        float((usage_E.double() * importance_E.double())[is_passed_E].sum())
        for usage_E, importance_E, is_passed_E in zip(usage, importance, passed, strict=True)
    )


def _check_layers(
    first: Sequence[Tensor], second: Sequence[Tensor], *, names: tuple[str, str]
) -> None:
    shapes = [[tuple(tensor.shape) for tensor in layers] for layers in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{names[1]} must have the shapes of {names[0]}, {shapes[0]}, got {shapes[1]}; "
            "give one value for each expert of each layer"
        )
