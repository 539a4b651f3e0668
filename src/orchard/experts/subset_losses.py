"""How far every set of a layer's experts is from the layer, without running an expert again.

A set C of experts answers with the mean of what each answers alone, by the family's own scores:

    F(x; C) = sum_i w_i F(x; {i}),    w_i = e_i / sum_j e_j,    i, j in C

e_i is exp(logit_i), or sigmoid(logit_i) where the family takes sigmoids, and F(x; {i}) is E_i(x)
times the weight of a lone expert: 1, or ``routed_scaling_factor`` (``models/view/lone.py``).

Weights add up to 1, so what C lacks is the same mean of what each of its experts lacks alone:
F(x; C) - F(x) = sum_i w_i D_i with D_i = F(x; {i}) - F(x). Its squared norm is

    sum_ij e_i e_j <D_i, D_j> / (sum_i e_i)^2

so a token's (E, E) inner products of the D_i, taken once, give the exact loss of all sets. They
are float64 throughout: dot products of a model's numbers lose nothing that a comparison could
notice, and no large terms cancel, as they would in |F|^2 - 2 <F, F(C)> + |F(C)|^2.

All experts of a set have a weight, also where a set is larger than the model's top-k, and groups
of experts do not count. Logits are the products of router rows and token states, plus the router's
bias. F(x) is the model's own, with everything that the family makes of them. PhiMoE's sparsemixer
is taken for a softmax, and where sigmoids are not normalized a set is still a mean.

Source: F(x; C) and the loss: Lu et al., 2024, arXiv:2402.14800 (Expert_Sparsity), as FLEx (Liu et
al., 2025, arXiv:2506.00965) uses it. The inner products are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from orchard.models.view.lone import LoneExperts, read_lone
from orchard.models.view.moe import MoELayer

NORM, FITTED = "norm", "fitted"
BLOCK_BYTES = 384 * 2**20  # of one block of tokens; a thousand tokens of Qwen1.5-MoE in bfloat16
_GRAM_TOKENS = 8  # their differences, in float64, still fit a cache
# exp(-300)^2 is the square of the smallest weight against 1; beyond, float64 would make it 0.
_LARGEST_GAP = 300.0

Source: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Iterator[tuple[Tensor, Tensor]]]
"""Yields numerators and weights of sets, both (sets, T), given what each expert (E, T) and each
pair (E, E, T) adds to them."""


@dataclass(frozen=True)
class TokenTerms:
    """What a block of tokens says about all sets of a layer's experts, in float64."""

    weight_ET: Tensor
    """e_i, scaled for each token so that the largest is 1."""
    gram_EET: Tensor
    """<D_i, D_j>."""
    cross_ET: Tensor
    """<F, D_i>."""
    output_T: Tensor
    """|F|^2."""

    @cached_property
    def own_ET(self) -> Tensor:
        """What each expert adds to the numerator of a set."""
        return self.gram_EET.diagonal().mT * self.weight_ET.square()

    @cached_property
    def pair_EET(self) -> Tensor:
        """What each pair adds to the numerator of a set."""
        return 2 * self.gram_EET * self.weight_ET * self.weight_ET[:, None]


def token_terms(
    layer: MoELayer,
    x_TD: Tensor,
    routed_TD: Tensor,
    *,
    run: Callable[[int, Tensor], Tensor] | None = None,
    lone: LoneExperts | None = None,
) -> TokenTerms:
    """Run every expert once and keep inner products.

    Args:
        layer: The layer.
        x_TD: What it reads.
        routed_TD: F, the output of its routed experts.
        run: How one expert is run on token states; None = as the layer holds it.
        lone: How its router weighs a lone expert; None = it is asked.

    Raises:
        ValueError: Router logits are too far apart for float64.
    """
    num_experts, num_tokens = layer.num_experts, x_TD.shape[0]
    width = routed_TD.shape[-1]
    run, lone = run or layer.run_expert, lone or read_lone(layer)
    y_ETD = x_TD.new_empty(num_experts, num_tokens, width)
    for expert in range(num_experts):
        y_ETD[expert] = run(expert, x_TD)
    weight_ET = _weights(lone, x_TD)
    alone_ET = None if lone.is_one else lone.weights(x_TD)
    # The differences of all experts, and F behind them: one product gives all that is kept.
    size = num_experts + 1
    rows = weight_ET.new_empty(min(num_tokens, _GRAM_TOKENS), size, width)
    products = weight_ET.new_empty(num_tokens, size, size)
    for start in range(0, num_tokens, _GRAM_TOKENS):
        block = slice(start, start + _GRAM_TOKENS)
        own = rows[: len(products[block])]
        own[:, :-1] = y_ETD[:, block].transpose(0, 1)
        if alone_ET is not None:
            own[:, :-1] *= alone_ET[:, block].T[..., None]
        own[:, -1] = routed_TD[block]
        own[:, :-1] -= own[:, -1:]
        torch.bmm(own, own.mT, out=products[block])
    return TokenTerms(
        weight_ET=weight_ET,
        gram_EET=products[:, :-1, :-1].permute(1, 2, 0).contiguous(),
        cross_ET=products[:, -1, :-1].T.contiguous(),
        output_T=products[:, -1, -1].clone(),
    )


def _weights(lone: LoneExperts, x_TD: Tensor) -> Tensor:
    layer = lone.layer
    rows = layer.router_tensors()
    bias = rows.get("bias")
    logits_TE = functional.linear(
        x_TD.double(), rows["weight"].double(), None if bias is None else bias.double()
    )
    if lone.takes_sigmoids:
        logits_TE = functional.logsigmoid(logits_TE)
    logits_TE -= logits_TE.amax(-1, keepdim=True)
    gap = -float(logits_TE.min()) if logits_TE.numel() else 0.0
    if gap > _LARGEST_GAP:
        raise ValueError(
            f"router logits of {layer.name} must lie within {_LARGEST_GAP:g} of each other for one "
            f"token, got {gap:.3g}; set strategy.graft_experts = 1 or check the base model"
        )
    return logits_TE.exp().T.contiguous()


def tokens_at_a_time(layer: MoELayer, *, element_bytes: int) -> int:
    """Return how many tokens fit ``BLOCK_BYTES``, at least 1.

    Args:
        layer: Every token has the outputs of all its experts, and their inner products three
            times: as they are, turned, and weighted.
        element_bytes: Of the experts' outputs.
    """
    num_experts = layer.num_experts
    token_bytes = num_experts * (layer.width * element_bytes + 3 * 8 * num_experts)
    return max(1, BLOCK_BYTES // token_bytes)


def all_sets(size: int) -> Source:
    """Return the source of all sets of ``size`` experts, in the order of combinations.

    Args:
        size: From 1.
    """

    def walk(
        weight_ET: Tensor, own_ET: Tensor, pair_EET: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        num_experts = weight_ET.shape[0]
        zero_T = torch.zeros_like(weight_ET[0])

        def descend(
            first: int, left: int, numerator_T: Tensor, sum_T: Tensor, added_ET: Tensor
        ) -> Iterator[tuple[Tensor, Tensor]]:
            # added_ET: what each expert from ``first`` on adds to the set so far.
            if left == 1:
                yield added_ET + numerator_T, weight_ET[first:] + sum_T
                return
            for expert in range(first, num_experts - left + 1):
                following_ET = added_ET[expert - first + 1 :]
                if pair_EET is not None:
                    following_ET = following_ET + pair_EET[expert, expert + 1 :]
                yield from descend(
                    expert + 1,
                    left - 1,
                    numerator_T + added_ET[expert - first],
                    sum_T + weight_ET[expert],
                    following_ET,
                )

        yield from descend(0, size, zero_T, zero_T, own_ET)

    return walk


def one_more(bases: Sequence[tuple[int, ...]]) -> Source:
    """Return the source of each base with each expert of the layer added, base by base.

    An expert that is in the base is added too; what that gives means nothing.
    """

    def walk(
        weight_ET: Tensor, own_ET: Tensor, pair_EET: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for base in bases:
            numerator_ET, sum_ET = own_ET.clone(), weight_ET.clone()
            for position, expert in enumerate(base):
                numerator_ET += own_ET[expert]
                sum_ET += weight_ET[expert]
                if pair_EET is not None:
                    numerator_ET += pair_EET[expert]
                    for other in base[:position]:
                        numerator_ET += pair_EET[expert, other]
            yield numerator_ET, sum_ET

    return walk


class Tally:
    """The losses of some sets, summed up over tokens and batches."""

    def __init__(self, source: Source, num_sets: int, *, loss: str) -> None:
        """Start at zero.

        Args:
            source: The sets.
            num_sets: How many it yields.
            loss: ``norm``, the sum over batches of the Frobenius norm of F - F(C), or ``fitted``,
                the Frobenius norm over all tokens of F - c F(C) with the best c of each set. c is
                at least 0: a gate cannot turn an expert's sign.
        """
        self._source, self._loss = source, loss
        self._square_N = torch.zeros(num_sets, dtype=torch.float64)  # of F - F(C)
        self._cross_N = torch.zeros(num_sets, dtype=torch.float64)  # <F, F(C) - F>
        self._total_N = torch.zeros(num_sets, dtype=torch.float64)
        self._output = self._largest = 0.0
        self._scale = 0.0

    def add(self, terms: TokenTerms) -> None:
        """Count a block of tokens."""
        self._output += float(terms.output_T.sum())
        self._largest += float(terms.gram_EET.diagonal().amax(-1).sum())
        self._square_N += _gather(
            numerator.div_(weight.square_()).sum(-1)
            for numerator, weight in self._source(terms.weight_ET, terms.own_ET, terms.pair_EET)
        )
        if self._loss == FITTED:
            own_ET = terms.cross_ET * terms.weight_ET
            self._cross_N += _gather(
                numerator.div_(weight).sum(-1)
                for numerator, weight in self._source(terms.weight_ET, own_ET, None)
            )

    def end_batch(self) -> None:
        """Close a batch: the paper's loss is a sum of one norm for each."""
        if self._loss == NORM:
            self._total_N += self._square_N.clamp(min=0).sqrt()
            self._square_N.zero_()
            self._scale += self._largest**0.5
            self._largest = 0.0

    def losses(self) -> Tensor:
        """Return the loss of each set, (N,) float64, at least 0."""
        if self._loss == NORM:
            return self._total_N
        # |F(C)|^2 and <F, F(C)> from F(C) = F + R.
        norm_N = (self._output + 2 * self._cross_N + self._square_N).clamp(min=0)
        product_N = self._output + self._cross_N
        missed_N = self._output * self._square_N - self._cross_N.square()
        fitted_N = (missed_N.clamp(min=0) / norm_N).clamp(max=self._output)
        is_against_N = (product_N <= 0) | (norm_N == 0)
        return torch.where(is_against_N, self._output, fitted_N).sqrt()

    @property
    def rounding(self) -> float:
        """How far apart the squares of two equal losses may be because of rounding."""
        scale = self._scale**2 if self._loss == NORM else self._output + self._largest
        return 1e-13 * scale  # a hundred times what was seen, and far below any real difference


def first_smallest(losses_N: Tensor, *, rounding: float) -> int:
    """Return the first set whose loss is the smallest, or differs from it by rounding alone.

    Args:
        losses_N: Losses.
        rounding: How far apart squares of equal losses may be.
    """
    square_N = losses_N.square()
    return int((square_N <= square_N.min() + rounding).nonzero()[0, 0])


def _gather(parts: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(parts)).cpu()
