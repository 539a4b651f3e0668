"""The mean of what adapters do, in the place of the mean of their factors.

A LoRA adapter adds B A to a layer. The mean of the factors of two clients is not the factors of the
mean: mean(B) mean(A) holds products of one client's B with another's A. Here the factors of all
clients are stacked, `[w_1 B_1, ..., w_n B_n] [A_1; ...; A_n] = mean(B_i A_i)` exactly, and what
clients are sent is the best approximation of that of the adapter's own rank, by a singular value
decomposition of a small matrix between two QR decompositions.

Source: FedEx-LoRA (Singhal et al., 2025, arXiv:2410.09432) and FLoRA (Wang et al., 2024,
arXiv:2409.05976) aggregate exactly by what is added to the base, or by adapters that grow; the
projection to the adapter's own rank is ours, so that the base stays frozen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from orchard.communication.messages import Update
from orchard.server.aggregation import WeightedMean
from orchard.trees import Tree

_A, _B = ".lora_A", ".lora_B"
# Relative to the largest singular value: what is below is rounding in the clients' float32.
_SMALLEST = 1e-7


def product_delta(updates: Iterable[Update], shared: Tree) -> dict[str, Tensor]:
    """Return a delta that brings every adapter to the mean of its clients' products.

    Names that are not both factors of an adapter get their weighted mean. Holds the factors of all
    updates in memory.

    Args:
        updates: Of the round, read once; both factors of an adapter in each, or none.
        shared: The global tree that they started from.

    Raises:
        ValueError: See ``WeightedMean``; or an update has one factor of an adapter alone.
    """
    bases = [name.removesuffix(_A) for name in shared if name.endswith(_A)]
    bases = [base for base in bases if base + _B in shared]
    paired = {base + factor for base in bases for factor in (_A, _B)}
    sums = WeightedMean()
    held: dict[str, list[tuple[float, Tensor, Tensor]]] = {}
    for update in updates:
        rest = {name: tensor for name, tensor in update.delta.items() if name not in paired}
        sums.add(rest, update.weight)
        for base in bases:
            sent = [base + factor for factor in (_A, _B) if base + factor in update.delta]
            if len(sent) == 1:
                raise ValueError(
                    f"an update must hold both factors of {base} with server.lora_aggregation = "
                    f"product, got {sent[0]} alone; send both, or choose factors"
                )
            if sent:
                a, b = (shared[name].double() + update.delta[name].double() for name in sent)
                held.setdefault(base, []).append((update.weight[sent[0]], a, b))
    delta = dict(sums.mean())
    for base, factors in held.items():
        for name, value in zip((base + _A, base + _B), project(factors), strict=True):
            delta[name] = (value - shared[name].double()).float()
    return delta


def project(factors: Iterable[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the factors of the weighted mean product, as near as their rank allows.

    Both factors get the root of the singular values. A direction that the mean does not have stays
    open to training: its row of A is kept, its column of B is zero.

    Args:
        factors: Of each client its weight, A (R, I) and B (O, R).

    Returns:
        A (R, I) and B (O, R).

    Raises:
        ValueError: The weights are all 0.
    """
    own = list(factors)
    total = sum(weight for weight, _, _ in own)
    if not total > 0:
        raise ValueError(
            f"weights of an adapter must not all be 0, got {total:g}; leave it out of the update "
            "where it does not count"
        )
    rank = own[0][1].shape[0]
    stacked_NI = torch.cat([a for _, a, _ in own])
    stacked_ON = torch.cat([b * (weight / total) for weight, _, b in own], dim=1)
    left_OM, upper_MN = torch.linalg.qr(stacked_ON)
    right_IM, lower_MN = torch.linalg.qr(stacked_NI.T)
    u, s, vh = torch.linalg.svd(upper_MN @ lower_MN.T, full_matrices=False)
    if not float(s.max()) > 0:
        mean_RI = torch.stack([weight / total * a for weight, a, _ in own]).sum(0)
        return mean_RI, torch.zeros_like(own[0][2])
    number = min(rank, len(s))
    u, s, vh = u[:, :number], s[:number], vh[:number]
    is_there = s > _SMALLEST * s.max()
    root = torch.where(is_there, s, torch.zeros_like(s)).sqrt()
    b_OR = (left_OM @ u) * root
    a_RI = torch.where(is_there, root, root[is_there].mean())[:, None] * (vh @ right_IM.T)
    if number < rank:  # a layer narrower than its adapter
        a_RI = torch.cat([a_RI, own[0][1][number:]])
        b_OR = torch.cat([b_OR, b_OR.new_zeros(len(b_OR), rank - number)], dim=1)
    return a_RI, b_OR
