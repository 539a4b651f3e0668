"""Fused experts that nobody trains, as one function of what they read.

Tokens are sorted by expert once. Each expert multiplies its own tokens, and all that lies between
the products runs for the tokens of all experts together. The backward pass returns gradients of
the tokens and of the router's weights, none of the experts, and needs of the forward pass what the
first product gave and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orchard.models.kernels.products import multiply_back, multiply_rows
from orchard.trees import SlicedTensor


@dataclass(frozen=True)
class FrozenWeights:
    """What fused experts hold, in ``nn.Linear`` orientation, and what runs between.

    Attributes:
        first_EGD: Gate and up projection, or up alone.
        down_EDF: Down projection.
        first_bias_EG: Of the first; None = none.
        down_bias_ED: Of the second; None = none.
        activate: From (P, G) to (P, F), token by token.
    """

    first_EGD: Tensor | SlicedTensor
    down_EDF: Tensor | SlicedTensor
    first_bias_EG: Tensor | None
    down_bias_ED: Tensor | None
    activate: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Groups:
    """Pairs of token and expert, sorted by expert.

    Attributes:
        token_P: The token of each pair.
        order_P: Its place among all T * K.
        counts: Pairs of each expert.
        place_TK: Where a token's pairs stand, in the order of its experts; P for no expert.
    """

    token_P: Tensor
    order_P: Tensor
    counts: list[int]
    place_TK: Tensor

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.token_P)

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield the experts that any token chose, and where their pairs are."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def sum_by_token(self, pairs_ND: Tensor) -> Tensor:
        """Return the sum of each token's pairs, (T, D), one expert after another.

        Args:
            pairs_ND: P rows, and one of zeros.
        """
        sum_TD = pairs_ND[self.place_TK[:, 0]]
        for place in range(1, self.place_TK.shape[1]):
            sum_TD += pairs_ND[self.place_TK[:, place]]
        return sum_TD


def group(choices_TK: Tensor, *, num_experts: int) -> Groups:
    """Sort the choices by expert; ``num_experts`` stands for none and is left out."""
    flat_N = choices_TK.flatten()
    order_N = flat_N.argsort(stable=True)
    counts = torch.bincount(flat_N, minlength=num_experts + 1).tolist()[:num_experts]
    order_P = order_N[: sum(counts)]
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    place_TK = place_N.clamp_(max=len(order_P)).view_as(choices_TK).sort(dim=1).values
    token_P = order_P.div(choices_TK.shape[1], rounding_mode="floor")
    return Groups(token_P, order_P, counts, place_TK)


def run_frozen(
    weights: FrozenWeights, x_TD: Tensor, choices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Return the weighted sum of each token's experts, (T, D), differentiable in x and weights.

    Args:
        weights: Of the experts, which get no gradient.
        x_TD: What they read.
        choices_TK: Each token's experts; E stands for none.
        weights_TK: What multiplies their outputs.
    """
    y_TD: Tensor = _Frozen.apply(weights, x_TD, choices_TK, weights_TK)  # type: ignore[no-untyped-call]
    return y_TD


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: FrozenWeights, x_TD: Tensor, choices_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        groups = group(choices_TK, num_experts=len(weights.down_EDF))
        x_PD = x_TD[groups.token_P]
        hidden_PG = x_TD.new_empty(groups.num_pairs, weights.first_EGD.shape[1])
        for expert, span in groups.spans():
            multiply_rows(x_PD[span], weights.first_EGD[expert], out_TN=hidden_PG[span])
            if weights.first_bias_EG is not None:
                hidden_PG[span] += weights.first_bias_EG[expert]
        y_ND = _run_down(weights, groups, weights.activate(hidden_PG), x_TD)
        y_ND[:-1] = y_ND[:-1] * weights_TK.flatten()[groups.order_P, None]
        ctx.weights, ctx.groups = weights, groups
        ctx.save_for_backward(hidden_PG, weights_TK)
        return groups.sum_by_token(y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[None, Tensor | None, None, Tensor | None]:
        weights: FrozenWeights = ctx.weights
        groups: Groups = ctx.groups
        hidden_PG, weights_TK = ctx.saved_tensors
        dy_PD = dy_TD[groups.token_P]
        down_PF = dy_TD.new_empty(groups.num_pairs, weights.down_EDF.shape[2])
        for expert, span in groups.spans():
            multiply_back(dy_PD[span], weights.down_EDF[expert], out_TM=down_PF[span])
        with torch.enable_grad():
            leaf_PG = hidden_PG.detach().requires_grad_()
            activated_PF = weights.activate(leaf_PG)
        dweights_TK = None
        if ctx.needs_input_grad[3]:
            own_P = (down_PF * activated_PF.detach()).sum(dim=-1, dtype=torch.float32)
            if weights.down_bias_ED is not None:
                for expert, span in groups.spans():
                    own_P[span] += dy_PD[span].float() @ weights.down_bias_ED[expert].float()
            dweights_TK = torch.zeros_like(weights_TK)
            dweights_TK.view(-1)[groups.order_P] = own_P.to(weights_TK.dtype)
        dx_TD = None
        if ctx.needs_input_grad[1]:
            scale_P1 = weights_TK.flatten()[groups.order_P, None]
            down_PF = (down_PF * scale_P1).to(dy_TD.dtype)
            (dhidden_PG,) = torch.autograd.grad(activated_PF, leaf_PG, down_PF)
            dx_ND = dy_TD.new_empty(groups.num_pairs + 1, dy_TD.shape[1])
            dx_ND[-1] = 0
            for expert, span in groups.spans():
                multiply_back(dhidden_PG[span], weights.first_EGD[expert], out_TM=dx_ND[span])
            dx_TD = groups.sum_by_token(dx_ND)
        return None, dx_TD, None, dweights_TK


def _run_down(weights: FrozenWeights, groups: Groups, hidden_PF: Tensor, x_TD: Tensor) -> Tensor:
    """Return each pair's output without its weight, and a row of zeros: (P + 1, D)."""
    y_ND = x_TD.new_empty(groups.num_pairs + 1, x_TD.shape[1])
    y_ND[-1] = 0
    for expert, span in groups.spans():
        multiply_rows(hidden_PF[span], weights.down_EDF[expert], out_TN=y_ND[span])
        if weights.down_bias_ED is not None:
            y_ND[span] += weights.down_bias_ED[expert]
    return y_ND
