"""A lower bound on what any set of r experts lacks, to judge a set that was searched for.

In words, for the loss ``norm`` of ``subset_losses``:

1. In a set, each token has one expert whose logit is the largest. If that is k, the other r - 1
   have lower logits, and the token's loss is at least some c_k, whichever they are:

   - what is missing is sum_i w_i D_i, no shorter than its part along D_k; the smallest that the
     others can make of <sum_i w_i D_i, D_k> is the minimum of a ratio of sums (Dinkelbach);
   - the loss is a quadratic form in the weights. Taking a multiple l of its diagonal away leaves
     a form with a minimum over all weights, and r weights that add up to 1 make sum_i l_i w_i^2 at
     least 1 / (1 / l_k + the r - 1 largest 1 / l_i).

2. So a token costs at least the smallest c_k of the set. For any number a,
   min c_k >= a - sum_k max(0, a - c_k), both over the set: the expert that serves a token gets a
   price a for it. Summed over tokens, a batch costs a set at least the sum of prices minus what its
   experts save, and no r experts save more than the r that save most.
3. Prices are raised and lowered by subgradients; any prices give a bound.

This is the dual of the k-median problem that remains when tokens choose among the experts of a
set. The bound is a real one: often far below the best set, never above it.

Source: ours. The dual: Cornuejols, Fisher and Nemhauser, 1977, "Location of bank accounts to
optimize float". The ratio: Dinkelbach, 1967, "On nonlinear fractional programming".
"""

from __future__ import annotations

import torch
from torch import Tensor

_TANGENT_STEPS = 40  # more move the bound by less than a thousandth
_RATIO_STEPS = 6  # Dinkelbach's steps square the error; what they leave is subtracted
_PRICE_STEPS = 150
_MARGIN = 1e-9  # of float64's own rounding in what is bounded
_TOKENS = 128  # whose (E, E) products are handled at a time


class GraftBound:
    """Sums up over tokens and batches what no set of so many experts can do better than."""

    def __init__(self, *, size: int, num_experts: int) -> None:
        """Start at zero.

        Args:
            size: r.
            num_experts: E.
        """
        self._size = size
        self._prices = 0.0
        self._saved_E = torch.zeros(num_experts, dtype=torch.float64)
        self._batches: list[tuple[float, Tensor]] = []

    def add(self, weight_ET: Tensor, gram_EET: Tensor) -> None:
        """Count a block of tokens.

        Args:
            weight_ET: Exponentials of router logits, whatever each token's scale.
            gram_EET: Inner products of what experts lack.
        """
        costs = [
            token_costs(weight_ET[:, part].T, gram_EET[..., part].permute(2, 0, 1), size=self._size)
            for part in _parts(weight_ET.shape[1])
        ]
        cost_TE = torch.cat(costs)
        price_T = choose_prices(cost_TE, size=self._size)
        self._prices += float(price_T.sum())
        self._saved_E += (price_T[:, None] - cost_TE).clamp(min=0).sum(0).cpu()

    def end_batch(self) -> None:
        """Close a batch: the loss is a sum of one norm for each."""
        self._batches.append((self._prices, self._saved_E))
        self._prices, self._saved_E = 0.0, torch.zeros_like(self._saved_E)

    def value(self) -> float:
        """Return the bound, at least 0.

        A batch's square is at least p - the savings of the set's experts. The root of that is
        above its chord, which is linear again, so that batches can agree on one set.
        """
        apart, together = 0.0, 0.0
        saved_E = torch.zeros_like(self._saved_E)
        for prices, own_E in self._batches:
            ordered_E = own_E.sort().values
            low = max(0.0, prices - float(ordered_E[-self._size :].sum()))
            high = max(0.0, prices - float(ordered_E[: self._size].sum()))
            apart += low**0.5
            slope = (high**0.5 - low**0.5) / (high - low) if high > low else 0.0
            together += low**0.5 + slope * (prices - low)
            saved_E += slope * own_E
        together -= float(saved_E.topk(self._size).values.sum())
        return max(apart, together) * (1 - _MARGIN)


def token_costs(weight_TE: Tensor, gram_TEE: Tensor, *, size: int) -> Tensor:
    """Return c, (T, E): a set's squared loss on a token is at least that of its largest logit.

    Infinite where too few experts have a lower logit; 0 for a token whose inner products are not
    finite, as its losses will tell.

    Args:
        weight_TE: Exponentials of router logits.
        gram_TEE: Inner products of what experts lack.
        size: r, at least 2.
    """
    is_finite_T = gram_TEE.isfinite().all(-1).all(-1)
    gram_TEE = torch.where(is_finite_T[:, None, None], gram_TEE, 0)
    num_experts = weight_TE.shape[1]
    own_TE = gram_TEE.diagonal(dim1=1, dim2=2)
    # ratio[t, k, j]: the weight of j where that of k, the largest in the set, is 1.
    ratio_TEE = weight_TE[:, None] / weight_TE[..., None]
    is_self = torch.eye(num_experts, dtype=torch.bool, device=weight_TE.device)
    is_out_TEE = (ratio_TEE > 1) | is_self
    smallest_TE = own_TE.clone()
    for step in range(_RATIO_STEPS):
        excess_TEE = ratio_TEE * (gram_TEE - smallest_TE[..., None])
        excess_TEE.masked_fill_(is_out_TEE, torch.inf)
        lowest = excess_TEE.topk(size - 1, largest=False)
        gap_TE = own_TE - smallest_TE + lowest.values.sum(-1)
        is_last = step == _RATIO_STEPS - 1
        # The last step keeps to the safe side: weights of a set add up to at least 1.
        sum_TE = 1 if is_last else 1 + ratio_TEE.gather(-1, lowest.indices).sum(-1)
        following_TE = smallest_TE + (gap_TE.clamp(max=0) if is_last else gap_TE) / sum_TE
        smallest_TE = torch.where(gap_TE.isfinite(), following_TE, smallest_TE)
    along_TE = smallest_TE.clamp(min=0).square() / own_TE.clamp(min=1e-300)
    cost_TE = torch.maximum(along_TE, _spread_costs(gram_TEE, size=size)) * (1 - _MARGIN)
    is_possible_TE = (~is_out_TEE).sum(-1) >= size - 1
    cost_TE = torch.where(is_possible_TE, cost_TE, torch.inf)
    return torch.where(is_finite_T[:, None], cost_TE, 0)


def _spread_costs(gram_TEE: Tensor, *, size: int) -> Tensor:
    """Return what weights spread over ``size`` experts cost at least, given one of them."""
    own_TE = gram_TEE.diagonal(dim1=1, dim2=2)
    inverse_TE = torch.where(own_TE > 0, own_TE, 1).rsqrt()
    correlation_TEE = gram_TEE * inverse_TE[:, None] * inverse_TE[..., None]
    smallest_T = torch.linalg.eigvalsh(correlation_TEE)[:, 0] - _MARGIN
    is_usable_T = (smallest_T > _MARGIN) & (own_TE > 0).all(-1)
    taken_TE = torch.where(is_usable_T, smallest_T, 0)[:, None] * own_TE
    rest_T = _smallest_form(gram_TEE - torch.diag_embed(taken_TE))
    inverse_TE = torch.where(taken_TE > 0, 1 / taken_TE, torch.inf)
    others_T = inverse_TE.topk(size - 1).values.sum(-1)
    return rest_T[:, None] + 1 / (others_T[:, None] + inverse_TE)


def _smallest_form(form_TEE: Tensor) -> Tensor:
    """Return a lower bound, at least 0, on w' G w over weights w that add up to 1.

    For a convex form any w gives one: 2 min(G w) - w' G w, by its tangent at w. The w here are
    those of Frank-Wolfe with exact steps.
    """
    w_TE = torch.full_like(form_TEE[..., 0], 1 / form_TEE.shape[-1])
    best_T = torch.zeros_like(w_TE[:, 0])
    tokens = torch.arange(len(form_TEE), device=form_TEE.device)
    product_TE = (form_TEE @ w_TE[..., None])[..., 0]
    for _ in range(_TANGENT_STEPS):
        value_T = (w_TE * product_TE).sum(-1)
        smallest_T, toward_T = product_TE.min(-1)
        best_T = torch.maximum(best_T, 2 * smallest_T - value_T)
        column_TE = form_TEE[tokens, toward_T]
        # Along w + a (vertex - w) the form is a parabola in a.
        slope_T = value_T - smallest_T
        curve_T = value_T - 2 * smallest_T + column_TE[tokens, toward_T]
        step_T = torch.where(curve_T > 0, slope_T / curve_T, 0).clamp(0, 1)
        w_TE = w_TE * (1 - step_T)[:, None]
        w_TE[tokens, toward_T] += step_T
        product_TE = product_TE + step_T[:, None] * (column_TE - product_TE)
    scale_T = form_TEE.diagonal(dim1=1, dim2=2).amax(-1)
    return (best_T - _MARGIN * scale_T).clamp(min=0)


def choose_prices(cost_TE: Tensor, *, size: int) -> Tensor:
    """Return a price for every token, (T,), that makes the bound large.

    Args:
        cost_TE: c.
        size: r.
    """
    # A set for these costs: the experts that help most one by one. What it costs is the aim.
    least_T = cost_TE.nan_to_num(posinf=0).amax(-1)
    for _ in range(size):
        served_TE = torch.minimum(cost_TE, least_T[:, None])
        least_T = served_TE[:, served_TE.sum(0).argmin()]
    aim, price_T, best_T, best = float(least_T.sum()), least_T.clone(), least_T, -torch.inf
    reach = 1.0
    for _ in range(_PRICE_STEPS):
        saved_TE = (price_T[:, None] - cost_TE).clamp(min=0)
        saved_E = saved_TE.sum(0)
        saving = saved_E.topk(size)
        bound = float(price_T.sum() - saving.values.sum())
        if bound > best:
            best, best_T = bound, price_T
        else:
            reach *= 0.97
        slope_T = 1 - (saved_TE[:, saving.indices] > 0).sum(-1).to(price_T)
        length = float(slope_T.square().sum())
        if length == 0 or bound >= aim:
            break
        price_T = (price_T + reach * (aim - bound) / length * slope_T).clamp(min=0)
    return best_T


def _parts(num_tokens: int) -> list[slice]:
    return [slice(start, start + _TOKENS) for start in range(0, num_tokens, _TOKENS)]
