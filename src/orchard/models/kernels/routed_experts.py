"""Fused experts that nobody trains, as one function of what they read.

Pairs of token and expert are sorted by expert once. Each expert multiplies its own tokens, and all
that lies between the products runs for the tokens of all experts together. The backward pass
returns gradients of the tokens and of the router's weights, none of the experts, and needs of the
forward pass what the first product gave and no more. How products are made is said by how pairs are
sorted: expert by expert in ``frozen_experts.py``, all in one in ``grouped_experts.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    first_bias_EG: Tensor | SlicedTensor | None
    down_bias_ED: Tensor | SlicedTensor | None
    activate: Callable[[Tensor], Tensor]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.down_EDF)

    def opened(self) -> AbstractContextManager[FrozenWeights]:
        """Give the weights for one pass over them; these stay where they are."""
        return nullcontext(self)


class WeightsElsewhere(Protocol):
    """Weights that are where they are needed for one pass, and may be gone at the next."""

    @property
    def num_experts(self) -> int:
        """E."""
        ...

    def opened(self) -> AbstractContextManager[FrozenWeights]:
        """Give the weights for one pass over them."""
        ...


class SortedPairs(Protocol):
    """N pairs of token and expert, sorted by expert, and how these multiply."""

    @property
    def token_N(self) -> Tensor:
        """The token of each pair."""
        ...

    @property
    def order_N(self) -> Tensor:
        """Its place among all T * K."""
        ...

    def multiply(
        self,
        x_NM: Tensor,
        matrices_EOM: Tensor | SlicedTensor,
        bias_EO: Tensor | SlicedTensor | None,
    ) -> Tensor:
        """Return each pair's row times its expert's matrix, with its bias: (N, O)."""
        ...

    def multiply_back(self, dy_NO: Tensor, matrices_EOM: Tensor | SlicedTensor) -> Tensor:
        """Return the gradient of the rows that were multiplied: (N, M)."""
        ...

    def sum_bias(self, dy_ND: Tensor, bias_ED: Tensor | SlicedTensor) -> Tensor:
        """Return the inner product of each pair's row and its expert's bias: (N,), in float32."""
        ...

    def sum_by_token(self, pairs_ND: Tensor) -> Tensor:
        """Return the sum of each token's pairs, one expert after another: (T, D)."""
        ...


def run_pairs(
    weights: FrozenWeights | WeightsElsewhere,
    x_TD: Tensor,
    weights_TK: Tensor,
    *,
    pairs: SortedPairs,
) -> Tensor:
    """Return the weighted sum of each token's experts, (T, D), differentiable in x and weights.

    Args:
        weights: Of the experts, which get no gradient; opened once in each direction.
        x_TD: What they read.
        weights_TK: What multiplies their outputs.
        pairs: The tokens' choices.
    """
    y_TD: Tensor = _Experts.apply(weights, pairs, x_TD, weights_TK)  # type: ignore[no-untyped-call]
    return y_TD


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: FrozenWeights | WeightsElsewhere,
        pairs: SortedPairs,
        x_TD: Tensor,
        weights_TK: Tensor,
    ) -> Tensor:
        with weights.opened() as own:
            hidden_NG = pairs.multiply(x_TD[pairs.token_N], own.first_EGD, own.first_bias_EG)
            y_ND = pairs.multiply(own.activate(hidden_NG), own.down_EDF, own.down_bias_ED)
        y_ND = y_ND * weights_TK.flatten()[pairs.order_N, None]
        ctx.weights, ctx.pairs = weights, pairs
        ctx.save_for_backward(hidden_NG, weights_TK)
        return pairs.sum_by_token(y_ND.to(x_TD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        with ctx.weights.opened() as own:
            return _go_back(ctx, own, dy_TD)


def _go_back(
    ctx: Any, weights: FrozenWeights, dy_TD: Tensor
) -> tuple[None, None, Tensor | None, Tensor | None]:
    pairs: SortedPairs = ctx.pairs
    hidden_NG, weights_TK = ctx.saved_tensors
    dy_ND = dy_TD[pairs.token_N]
    down_NF = pairs.multiply_back(dy_ND, weights.down_EDF)
    with torch.enable_grad():
        leaf_NG = hidden_NG.detach().requires_grad_()
        activated_NF = weights.activate(leaf_NG)
    dweights_TK = None
    if ctx.needs_input_grad[3]:
        own_N = (down_NF * activated_NF.detach()).sum(dim=-1, dtype=torch.float32)
        if weights.down_bias_ED is not None:
            own_N += pairs.sum_bias(dy_ND, weights.down_bias_ED)
        dweights_TK = torch.zeros_like(weights_TK)
        dweights_TK.view(-1)[pairs.order_N] = own_N.to(weights_TK.dtype)
    dx_TD = None
    if ctx.needs_input_grad[2]:
        scale_N1 = weights_TK.flatten()[pairs.order_N, None]
        down_NF = (down_NF * scale_N1).to(activated_NF.dtype)
        (dhidden_NG,) = torch.autograd.grad(activated_NF, leaf_NG, down_NF)
        dx_TD = pairs.sum_by_token(pairs.multiply_back(dhidden_NG, weights.first_EGD))
    return None, None, dx_TD, dweights_TK
