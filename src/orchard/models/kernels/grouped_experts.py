"""Frozen fused experts on a device that the host does not wait for.

As ``frozen_experts.py``, with all experts of a layer in one ``torch._grouped_mm``: how many
tokens each expert has is known to the device alone, so the host asks for no number and loops over
no expert. The rows of every pair of token and expert are there, also of those that chose none,
which come last and are set to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orchard.models.kernels import waiting
from orchard.models.kernels.routed_experts import FrozenWeights, WeightsElsewhere, run_pairs
from orchard.trees import SlicedTensor

_ALIGNED_BYTES = 16
"""Rows of each factor begin at multiples of this: what ``torch._grouped_mm`` asks for."""


def can_group(weights: FrozenWeights, x_TD: Tensor) -> bool:
    """Say whether experts can run in one product on the device of what they read.

    Not where the host may wait, which is faster expert by expert; not where experts are read one at
    a time, in another dtype than bfloat16, or in widths that are not aligned.
    """
    first, down = weights.first_EGD, weights.down_EDF
    biases = (weights.first_bias_EG, weights.down_bias_ED)
    if (
        waiting.may_wait(x_TD.device)
        or not isinstance(first, Tensor)
        or not isinstance(down, Tensor)
        or any(isinstance(bias, SlicedTensor) for bias in biases)
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

    def multiply(
        self,
        x_NM: Tensor,
        matrices_EOM: Tensor | SlicedTensor,
        bias_EO: Tensor | SlicedTensor | None,
    ) -> Tensor:
        """Return each pair's row times its expert's matrix, with its bias: (N, O)."""
        y_NO = self._multiply(x_NM, _whole(matrices_EOM).mT)
        return y_NO if bias_EO is None else y_NO + _whole(bias_EO)[self.expert_N]

    def multiply_back(self, dy_NO: Tensor, matrices_EOM: Tensor | SlicedTensor) -> Tensor:
        """Return the gradient of the rows that were multiplied: (N, M)."""
        return self._multiply(dy_NO, _whole(matrices_EOM))

    def sum_bias(self, dy_ND: Tensor, bias_ED: Tensor | SlicedTensor) -> Tensor:
        """Return the inner product of each pair's row and its expert's bias: (N,), in float32."""
        sum_N = (dy_ND.float() * _whole(bias_ED)[self.expert_N].float()).sum(dim=-1)
        return sum_N.masked_fill(self.is_none_N1[:, 0], 0)

    def sum_by_token(self, pairs_ND: Tensor) -> Tensor:
        """Return the sum of each token's pairs, one expert after another: (T, D)."""
        pairs_ND = pairs_ND.masked_fill(self.is_none_N1, 0)
        sum_TD = pairs_ND[self.place_TK[:, 0]]
        for place in range(1, self.place_TK.shape[1]):
            sum_TD = sum_TD + pairs_ND[self.place_TK[:, place]]
        return sum_TD

    def _multiply(self, x_NM: Tensor, matrices_EMO: Tensor) -> Tensor:
        y_NO = torch._grouped_mm(x_NM.contiguous(), matrices_EMO, offs=self.ends_E)
        # Nothing was written for pairs of no expert, and what is not finite would spread.
        return y_NO.masked_fill(self.is_none_N1, 0)


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
    weights: FrozenWeights | WeightsElsewhere,
    x_TD: Tensor,
    choices_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Return what ``run_frozen`` does, (T, D), for weights of which ``can_group`` holds."""
    return run_pairs(
        weights, x_TD, weights_TK, pairs=pair(choices_TK, num_experts=weights.num_experts)
    )


def _whole(matrices: Tensor | SlicedTensor) -> Tensor:
    assert isinstance(matrices, Tensor)
    return matrices
