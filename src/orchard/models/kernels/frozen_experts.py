"""Frozen fused experts, one after another: each multiplies the tokens that chose it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from orchard.models.kernels.products import multiply_back, multiply_rows
from orchard.models.kernels.routed_experts import FrozenWeights, WeightsElsewhere, run_pairs
from orchard.trees import SlicedTensor


@dataclass(frozen=True)
class Groups:
    """Pairs of token and expert, sorted by expert, without those of no expert.

    Attributes:
        token_N: The token of each pair.
        order_N: Its place among all T * K.
        counts: Pairs of each expert.
        place_TK: Where a token's pairs stand, in the order of its experts; N for no expert.
    """

    token_N: Tensor
    order_N: Tensor
    counts: list[int]
    place_TK: Tensor

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield the experts that any token chose, and where their pairs are."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def multiply(
        self,
        x_NM: Tensor,
        matrices_EOM: Tensor | SlicedTensor,
        bias_EO: Tensor | SlicedTensor | None,
    ) -> Tensor:
        """Return each pair's row times its expert's matrix, with its bias: (N, O)."""
        y_NO = x_NM.new_empty(len(x_NM), matrices_EOM.shape[1])
        for expert, span in self.spans():
            multiply_rows(x_NM[span], matrices_EOM[expert], out_TN=y_NO[span])
            if bias_EO is not None:
                y_NO[span] += bias_EO[expert]
        return y_NO

    def multiply_back(self, dy_NO: Tensor, matrices_EOM: Tensor | SlicedTensor) -> Tensor:
        """Return the gradient of the rows that were multiplied: (N, M)."""
        dx_NM = dy_NO.new_empty(len(dy_NO), matrices_EOM.shape[2])
        for expert, span in self.spans():
            multiply_back(dy_NO[span], matrices_EOM[expert], out_TM=dx_NM[span])
        return dx_NM

    def sum_bias(self, dy_ND: Tensor, bias_ED: Tensor | SlicedTensor) -> Tensor:
        """Return the inner product of each pair's row and its expert's bias: (N,), in float32."""
        sum_N = dy_ND.new_empty(len(dy_ND), dtype=torch.float32)
        for expert, span in self.spans():
            sum_N[span] = dy_ND[span].float() @ bias_ED[expert].float()
        return sum_N

    def sum_by_token(self, pairs_ND: Tensor) -> Tensor:
        """Return the sum of each token's pairs, one expert after another: (T, D)."""
        if len(pairs_ND) < self.place_TK.numel():
            # For tokens that chose fewer than K.
            pairs_ND = functional.pad(pairs_ND, (0, 0, 0, 1))
        sum_TD = pairs_ND[self.place_TK[:, 0]]
        for place in range(1, self.place_TK.shape[1]):
            sum_TD += pairs_ND[self.place_TK[:, place]]
        return sum_TD


def group(choices_TK: Tensor, *, num_experts: int) -> Groups:
    """Sort the choices by expert; ``num_experts`` stands for none and is left out."""
    flat_N = choices_TK.flatten()
    order_N = flat_N.argsort(stable=True)
    counts = torch.bincount(flat_N, minlength=num_experts + 1).tolist()[:num_experts]
    chosen_N = order_N[: sum(counts)]
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    place_TK = place_N.clamp_(max=len(chosen_N)).view_as(choices_TK).sort(dim=1).values
    token_N = chosen_N.div(choices_TK.shape[1], rounding_mode="floor")
    return Groups(token_N, chosen_N, counts, place_TK)


def run_frozen(
    weights: FrozenWeights | WeightsElsewhere,
    x_TD: Tensor,
    choices_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Return the weighted sum of each token's experts, (T, D), differentiable in x and weights.

    Args:
        weights: Of the experts, which get no gradient.
        x_TD: What they read.
        choices_TK: Each token's experts; E stands for none.
        weights_TK: What multiplies their outputs.
    """
    return run_pairs(
        weights, x_TD, weights_TK, pairs=group(choices_TK, num_experts=weights.num_experts)
    )
