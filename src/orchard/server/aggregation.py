"""One kernel: the mean over the clients that sent a name, with their weights.

It is FedAvg when every client sends every name, FLEx when nobody sends experts, and HFedMoE when
each client sends the experts it used. The kernel is a pair of sums per name, so it reads a stream
of updates, holds one tree and one update, and merges with the sums of another server.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from orchard.communication.messages import Update
from orchard.trees import Tree, Widened

# Elements that are gathered and added with one call: LoRA has thousands of small tensors, and a
# call for each costs more than the sum. Not more, because what is gathered is in float32.
_GATHERED = 1 << 18
# Elements that are widened to float32 at a time, 256 KiB: they stay in a cache, and a large tensor
# needs no second one of twice its size.
_BLOCK = 1 << 16


class WeightedMean:
    """Running weighted sums per name, in float32, in the order in which updates arrive."""

    def __init__(self) -> None:
        """Start with no name."""
        self._weighted_sum: dict[str, torch.Tensor] = {}
        self._weight_sum: dict[str, float] = {}
        self._block: torch.Tensor | None = None

    def add(self, values: Tree, weights: Mapping[str, float]) -> None:
        """Add one client's values, each read once.

        Args:
            values: Name to tensor of any shape and floating dtype.
            weights: Name to weight, at least 0. A name of ``values`` that is missing here does
                not count.

        Raises:
            ValueError: A weight is negative or not finite, or a shape differs from an earlier one.
        """
        sums, weight_sum = self._weighted_sum, self._weight_sum
        totals: list[torch.Tensor] = []
        tensors: list[torch.Tensor] = []
        num_elements, last_weight = 0, 0.0
        # The sum widens by itself.
        stored = values.stored if isinstance(values, Widened) else values
        for name, tensor in stored.items():
            if name not in weights:
                continue
            weight = weights[name]
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"weight of {name} must be a finite number of at least 0, got {weight}; "
                    "check the strategy's weigh"
                )
            total = sums.get(name)
            if total is None:
                total = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
                sums[name], weight_sum[name] = total, 0.0
            elif tensor.shape != total.shape:
                raise _shape_error(name, tensor, total)
            weight_sum[name] += weight
            if weight == 0:  # what does not count must not poison the sum, even where it is NaN
                continue
            if tensor.dtype is not torch.float32:
                if tensor.numel() > _BLOCK:
                    self._add_in_blocks(total, tensor, weight)
                    continue
                tensor = tensor.float()
            if weight != last_weight or num_elements >= _GATHERED:
                _add(totals, tensors, last_weight)
                totals, tensors, num_elements, last_weight = [], [], 0, weight
            totals.append(total)
            tensors.append(tensor)
            num_elements += tensor.numel()
        _add(totals, tensors, last_weight)

    def _add_in_blocks(self, total: torch.Tensor, tensor: torch.Tensor, weight: float) -> None:
        if self._block is None or self._block.device != tensor.device:
            self._block = torch.empty(_BLOCK, device=tensor.device)
        blocks = torch.split(total.view(-1), _BLOCK), torch.split(tensor.reshape(-1), _BLOCK)
        for part, narrow in zip(*blocks, strict=True):
            wide = self._block[: len(narrow)]
            part.add_(wide.copy_(narrow), alpha=weight)

    def merge(self, other: WeightedMean) -> None:
        """Add the partial sums of ``other``, which keeps its own."""
        for name, total in other._weighted_sum.items():
            own = self._weighted_sum.get(name)
            if own is None:
                self._weighted_sum[name] = total.clone()
            elif own.shape != total.shape:
                raise _shape_error(name, total, own)
            else:
                own += total
            self._weight_sum[name] = self._weight_sum.get(name, 0.0) + other._weight_sum[name]

    def mean(self) -> dict[str, torch.Tensor]:
        """Return the weighted mean of every name that was sent, in float32, and start anew.

        The sums become the mean, so that there is never a second tree.

        Raises:
            ValueError: A name was sent, but with weight 0 by every client that sent it.
        """
        for name, weight in self._weight_sum.items():
            if weight == 0.0:
                raise ValueError(
                    f"weights of {name} must not all be 0, got {weight}; leave the name out of "
                    "the update where it does not count"
                )
        found, weights = self._weighted_sum, self._weight_sum
        self._weighted_sum, self._weight_sum = {}, {}
        if found:
            torch._foreach_div_(list(found.values()), [weights[name] for name in found])
        return found


def _add(totals: list[torch.Tensor], tensors: list[torch.Tensor], weight: float) -> None:
    if totals:
        torch._foreach_add_(totals, tensors, alpha=weight)


def _shape_error(name: str, tensor: torch.Tensor, total: torch.Tensor) -> ValueError:
    return ValueError(
        f"{name} must have shape {tuple(total.shape)} as in earlier updates, got "
        f"{tuple(tensor.shape)}; check that all clients run the same recipe"
    )


def mean(updates: Iterable[Update]) -> dict[str, torch.Tensor]:
    """Reduce a stream of updates to the weighted mean delta of every name that was sent.

    A name nobody sent is absent from the result, so its global value stays; it is never averaged
    with zero. An update is let go before the next one is asked for.

    Raises:
        ValueError: See ``WeightedMean``.
    """
    sums = WeightedMean()
    for update in updates:
        sums.add(update.delta, update.weight)
        del update
    return sums.mean()
