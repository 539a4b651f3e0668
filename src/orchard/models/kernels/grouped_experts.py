"""Frozen fused experts on a device that the host does not wait for.

As ``frozen_experts.py``, with all experts of a layer in one ``torch._grouped_mm``: how many
tokens each expert has is known to the device alone, so the host asks for no number and loops over
no expert. The rows of every pair of token and expert are there, also of those that chose none,
which come last and are set to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orchard.models.kernels import waiting
from orchard.models.kernels.frozen_experts import FrozenWeights

_ALIGNED_BYTES = 16
"""Rows of each factor begin at multiples of this: what ``torch._grouped_mm`` asks for."""


def can_group(weights: FrozenWeights, x_TD: Tensor) -> bool:
    """Say whether experts can run in one product on the device of what they read.

    Not where the host may wait, which is faster expert by expert; not where experts are read one at
    a time, in another dtype than bfloat16, or in widths that are not aligned.
    """
    first, down = weights.first_EGD, weights.down_EDF
    if (
        waiting.may_wait(x_TD.device)
        or not isinstance(first, Tensor)
        or not isinstance(down, Tensor)
    ):
        return False
    return all(_fits(matrix, x_TD.dtype) for matrix in (first, down))


def _fits(matrix: Tensor, dtype: torch.dtype) -> bool:
    if matrix.dtype != dtype or dtype != torch.bfloat16:
        return False
    strides = matrix.stride()
    # One of the last two is dense, and the other one and the experts' are aligned.
    dense = 1 if strides[1] == 1 else 2
    others = [strides[0], strides[3 - dense]]
    return (
        strides[dense] == 1
        and all(stride * matrix.element_size() % _ALIGNED_BYTES == 0 for stride in others)
        and all(size * matrix.element_size() % _ALIGNED_BYTES == 0 for size in matrix.shape[1:])
    )


@dataclass(frozen=True)
class Pairs:
    """All pairs of token and expert, sorted by expert, those of none last.

    Attributes:
        token_N: The token of each pair.
        order_N: Its place among all T * K.
        ends_E: Where the pairs of each expert end, int32.
        expert_N: The expert of each pair; of those of none, any.
        is_none_N1: Whether a pair has no expert.
        place_TK: Where a token's pairs stand, in the order of its experts.
    """

    token_N: Tensor
    order_N: Tensor
    ends_E: Tensor
    expert_N: Tensor
    is_none_N1: Tensor
    place_TK: Tensor

    def sum_by_token(self, pairs_ND: Tensor) -> Tensor:
        """Return the sum of each token's pairs, (T, D), one expert after another."""
        sum_TD = pairs_ND[self.place_TK[:, 0]]
        for place in range(1, self.place_TK.shape[1]):
            sum_TD = sum_TD + pairs_ND[self.place_TK[:, place]]
        return sum_TD


def pair(choices_TK: Tensor, *, num_experts: int) -> Pairs:
    """Sort the choices by expert, without asking how many there are of each."""
    flat_N = choices_TK.flatten()
    order_N = flat_N.argsort(stable=True)
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_N.device)
    counts_E.scatter_add_(0, flat_N, torch.ones_like(flat_N))
    sorted_N = flat_N[order_N]
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return Pairs(
        token_N=order_N.div(choices_TK.shape[1], rounding_mode="floor"),
        order_N=order_N,
        ends_E=counts_E[:num_experts].cumsum(0).to(torch.int32),
        expert_N=sorted_N.clamp(max=num_experts - 1),
        is_none_N1=(sorted_N >= num_experts)[:, None],
        place_TK=place_N.view_as(choices_TK).sort(dim=1).values,
    )


def run_grouped(
    weights: FrozenWeights, x_TD: Tensor, choices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Return what ``run_frozen`` does, (T, D), for weights of which ``can_group`` holds."""
    y_TD: Tensor = _Grouped.apply(weights, x_TD, choices_TK, weights_TK)  # type: ignore[no-untyped-call]
    return y_TD


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: FrozenWeights, x_TD: Tensor, choices_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        first, down = _tensors(weights)
        pairs = pair(choices_TK, num_experts=len(down))
        hidden_NG = _multiply(x_TD[pairs.token_N], first.mT, pairs)
        if weights.first_bias_EG is not None:
            hidden_NG = hidden_NG + weights.first_bias_EG[pairs.expert_N]
        y_ND = _multiply(weights.activate(hidden_NG), down.mT, pairs)
        if weights.down_bias_ED is not None:
            y_ND = y_ND + weights.down_bias_ED[pairs.expert_N]
        y_ND = y_ND * weights_TK.flatten()[pairs.order_N, None]
        ctx.weights, ctx.pairs = weights, pairs
        ctx.save_for_backward(hidden_NG, weights_TK)
        return pairs.sum_by_token(y_ND.to(x_TD.dtype).masked_fill(pairs.is_none_N1, 0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[None, Tensor | None, None, Tensor | None]:
        weights: FrozenWeights = ctx.weights
        pairs: Pairs = ctx.pairs
        first, down = _tensors(weights)
        hidden_NG, weights_TK = ctx.saved_tensors
        dy_ND = dy_TD[pairs.token_N].to(down.dtype)
        down_NF = _multiply(dy_ND, down, pairs)
        with torch.enable_grad():
            leaf_NG = hidden_NG.detach().requires_grad_()
            activated_NF = weights.activate(leaf_NG)
        dweights_TK = None
        if ctx.needs_input_grad[3]:
            own_N = (down_NF * activated_NF.detach()).sum(dim=-1, dtype=torch.float32)
            if weights.down_bias_ED is not None:
                bias_ND = weights.down_bias_ED[pairs.expert_N].float()
                own_N = own_N + (dy_ND.float() * bias_ND).sum(dim=-1)
            own_N = own_N.masked_fill(pairs.is_none_N1[:, 0], 0)
            dweights_TK = torch.zeros_like(weights_TK)
            dweights_TK.view(-1)[pairs.order_N] = own_N.to(weights_TK.dtype)
        dx_TD = None
        if ctx.needs_input_grad[1]:
            scale_N1 = weights_TK.flatten()[pairs.order_N, None]
            (dhidden_NG,) = torch.autograd.grad(
                activated_NF, leaf_NG, (down_NF * scale_N1).to(activated_NF.dtype)
            )
            dx_ND = _multiply(dhidden_NG, first, pairs)
            dx_TD = pairs.sum_by_token(dx_ND.masked_fill(pairs.is_none_N1, 0))
        return None, dx_TD, None, dweights_TK


def _multiply(x_NM: Tensor, matrix_EMO: Tensor, pairs: Pairs) -> Tensor:
    """Multiply each pair's row with its expert's matrix; those of no expert become zero."""
    y_NO = torch._grouped_mm(x_NM.contiguous(), matrix_EMO, offs=pairs.ends_E)
    # Nothing was written there, and what is not finite would spread.
    return y_NO.masked_fill(pairs.is_none_N1, 0)


def _tensors(weights: FrozenWeights) -> tuple[Tensor, Tensor]:
    assert isinstance(weights.first_EGD, Tensor)
    assert isinstance(weights.down_EDF, Tensor)
    return weights.first_EGD, weights.down_EDF
