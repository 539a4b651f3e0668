"""Aggregation that a minority of broken or hostile clients cannot steer.

Each kernel reduces the updates of a round to one delta per name, as the mean does, but holds all
of them at once: its memory is one tree for each client. Who lies about an update can lie about its
weight, so the median, the trimmed mean and the distances give every client that sent a name the
same weight; the clipped mean bounds each client's step and keeps the weights.

A name that fewer than three clients sent is refused: nobody can say then who is the odd one out,
and its global value stays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from orchard.communication.messages import Update
from orchard.server.aggregation import WeightedMean
from orchard.trees import Tree

log = logging.getLogger(__name__)
MIN_CONTRIBUTORS = 3
KERNELS = ("median", "trimmed_mean", "clipped_mean", "krum")
_Kernel: TypeAlias = Callable[[Tensor], Tensor]
"""From the values of a name, (C, ...) float32, to one value."""


class TooFewContributorsError(ValueError):
    """No name came from enough clients to say who is the odd one out."""


@dataclass(frozen=True)
class RobustSettings:
    """How much of a round may be wrong.

    Attributes:
        kernel: One of ``KERNELS``.
        trim: Share of the clients that the trimmed mean drops at each end of every value, at
            least one client; and share of the clients that ``krum`` leaves out.
        max_norm: L2 norm that ``clipped_mean`` scales updates down to; 0 = the round's median norm.
    """

    kernel: str
    trim: float = 0.2
    max_norm: float = 0.0


def robust_aggregate(
    settings: RobustSettings,
) -> Callable[[Iterable[Update], Tree], dict[str, Tensor]]:
    """Return the aggregation of a strategy that uses a robust kernel."""
    if settings.kernel == "median":
        return partial(_by_name, kernel=_median)
    if settings.kernel == "trimmed_mean":
        return partial(_by_name, kernel=partial(_trimmed_mean, share=settings.trim))
    if settings.kernel == "clipped_mean":
        return partial(_clipped_mean, max_norm=settings.max_norm)
    return partial(_krum, share=settings.trim)


def _contributions(updates: Iterable[Update]) -> dict[str, list[Tensor]]:
    """Return the values of every name that was sent with a weight above 0."""
    values: dict[str, list[Tensor]] = {}
    for update in updates:
        for name, tensor in update.delta.items():
            if update.weight[name] > 0:
                values.setdefault(name, []).append(tensor.float())
    return values


def _refuse_few(values: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Return the names that enough clients sent.

    Raises:
        TooFewContributorsError: No name is one.
    """
    few = [name for name, own in values.items() if len(own) < MIN_CONTRIBUTORS]
    if few:
        log.warning(
            "%d of %d names keep their values: fewer than %d clients sent them, such as %s",
            len(few),
            len(values),
            MIN_CONTRIBUTORS,
            few[0],
        )
    if values and len(few) == len(values):
        raise TooFewContributorsError(
            f"robust aggregation must have at least {MIN_CONTRIBUTORS} clients that sent a name, "
            f"got {max(map(len, values.values()))}; use server.aggregation = mean, or more clients"
        )
    return {name: own for name, own in values.items() if len(own) >= MIN_CONTRIBUTORS}


def _by_name(updates: Iterable[Update], shared: Tree, *, kernel: _Kernel) -> dict[str, Tensor]:
    """Reduce every name by itself, coordinate by coordinate."""
    values = _refuse_few(_contributions(updates))
    # Each list is let go once it is reduced.
    return {name: kernel(torch.stack(values.pop(name))) for name in list(values)}


def _median(values: Tensor) -> Tensor:
    """Return the coordinate-wise median; of an even number, the mean of the middle two.

    Source: Yin et al., 2018, arXiv:1803.01498.
    """
    ordered = values.sort(dim=0).values
    number = len(ordered)
    return (ordered[(number - 1) // 2] + ordered[number // 2]) / 2


def _trimmed_mean(values: Tensor, *, share: float) -> Tensor:
    """Return the mean of each coordinate without its smallest and largest values.

    Source: Yin et al., 2018, arXiv:1803.01498.
    """
    number = len(values)
    dropped = min(max(1, math.floor(share * number)), (number - 1) // 2)
    return values.sort(dim=0).values[dropped : number - dropped].mean(dim=0)


def _clipped_mean(updates: Iterable[Update], shared: Tree, *, max_norm: float) -> dict[str, Tensor]:
    """Return the weighted mean of updates, each scaled down to at most a norm."""
    held = list(updates)
    names = _refuse_few(_contributions(held)).keys()
    norms = [_norm(update.delta.values()) for update in held]
    limit = max_norm or float(torch.tensor(norms, dtype=torch.float64).quantile(0.5))
    sums = WeightedMean()
    for update, norm in zip(held, norms, strict=True):
        scale = min(1.0, limit / norm) if norm > 0 else 1.0
        kept = {name: t.float() * scale for name, t in update.delta.items() if name in names}
        sums.add(kept, update.weight)
    return sums.mean()


def _krum(updates: Iterable[Update], shared: Tree, *, share: float) -> dict[str, Tensor]:
    """Return the plain mean of the updates that lie closest to each other.

    The mean squared difference of two updates is over the names that both sent, so that clients
    with other experts can be compared. A client's score is the sum over its closest neighbors, all
    but the share that may be hostile and two; the best ones are averaged.

    Source: Blanchard et al., 2017, arXiv:1703.02757 (multi-Krum); theirs compares whole vectors.
    """
    held = list(updates)
    number = len(held)
    num_hostile = min(max(1, math.floor(share * number)), (number - 1) // 2)
    names = _refuse_few(_contributions(held)).keys()
    distances = [[_distance(a.delta, b.delta) for b in held] for a in held]
    num_near = max(1, number - num_hostile - 2)
    scores = [
        math.fsum(sorted(d for j, d in enumerate(row) if j != i)[:num_near])
        for i, row in enumerate(distances)
    ]
    best = sorted(range(number), key=lambda i: (scores[i], i))[: number - num_hostile]
    values = _contributions(held[index] for index in sorted(best))
    return {name: torch.stack(own).mean(dim=0) for name, own in values.items() if name in names}


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(math.fsum(float(t.double().square().sum()) for t in tensors))


def _distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Return the mean squared difference over the names that both have; infinity without any."""
    names: Sequence[str] = sorted(left.keys() & right.keys())
    size = sum(left[name].numel() for name in names)
    if size == 0:
        return math.inf
    total = math.fsum(
        float((left[name].double() - right[name].double()).square().sum()) for name in names
    )
    return total / size
