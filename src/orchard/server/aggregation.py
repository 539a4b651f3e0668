"""One kernel: the mean over the clients that sent a name, with their weights.

It is FedAvg when every client sends every name, FLEx when nobody sends experts, and HFedMoE when
each client sends the experts it used. The kernel is a pair of sums per name, so it reads a stream
of updates, holds one tree, and merges with the sums of another server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from orchard.communication.messages import Update
from orchard.trees import Tree


class WeightedMean:
    """Running weighted sums per name, in float32, in the order in which updates arrive."""

    def __init__(self) -> None:
        """Start with no name."""
        self._weighted_sum: dict[str, torch.Tensor] = {}
        self._weight_sum: dict[str, float] = {}

    def add(self, values: Tree, weights: Mapping[str, float]) -> None:
        """Add one client's values.

        Args:
            values: Name to tensor of any shape and floating dtype.
            weights: Name to weight, at least 0. A name of ``values`` that is missing here does
                not count.

        Raises:
            ValueError: A weight is negative or not finite, or a shape differs from an earlier one.
        """
        for name, tensor in values.items():
            if name not in weights:
                continue
            weight = float(weights[name])
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(
                    f"weight of {name} must be a finite number of at least 0, got {weight}; "
                    "check the strategy's weigh"
                )
            if name not in self._weighted_sum:
                self._weighted_sum[name] = torch.zeros_like(tensor, dtype=torch.float32)
            self._check_shape(name, tensor)
            if weight > 0:  # what does not count must not poison the sum, even where it is NaN
                self._weighted_sum[name].add_(tensor.float(), alpha=weight)
            self._weight_sum[name] = self._weight_sum.get(name, 0.0) + weight

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        expected = self._weighted_sum[name].shape
        if tensor.shape != expected:
            raise ValueError(
                f"{name} must have shape {tuple(expected)} as in earlier updates, got "
                f"{tuple(tensor.shape)}; check that all clients run the same recipe"
            )

    def merge(self, other: WeightedMean) -> None:
        """Add the partial sums of ``other``, which keeps its own."""
        for name, total in other._weighted_sum.items():
            if name in self._weighted_sum:
                self._check_shape(name, total)
                self._weighted_sum[name] = self._weighted_sum[name] + total
            else:
                self._weighted_sum[name] = total.clone()
            self._weight_sum[name] = self._weight_sum.get(name, 0.0) + other._weight_sum[name]

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the weighted mean of every name that was sent, in float32.

        Raises:
            ValueError: A name was sent, but with weight 0 by every client that sent it.
        """
        for name, weight in self._weight_sum.items():
            if weight == 0.0:
                raise ValueError(
                    f"weights of {name} must not all be 0, got {weight}; leave the name out of "
                    "the update where it does not count"
                )
        return {name: total / self._weight_sum[name] for name, total in self._weighted_sum.items()}


def mean(updates: Iterable[Update]) -> dict[str, torch.Tensor]:
    """Reduce a stream of updates to the weighted mean delta of every name that was sent.

    A name nobody sent is absent from the result, so its global value stays; it is never averaged
    with zero.

    Raises:
        ValueError: See ``WeightedMean``.
    """
    sums = WeightedMean()
    for update in updates:
        sums.add(update.delta, update.weight)
    return sums.mean()
