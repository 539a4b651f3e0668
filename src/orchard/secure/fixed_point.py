"""Updates as vectors of whole numbers modulo 2**32, whose sum cannot overflow.

A masked vector is added modulo 2**32, so what is masked must be whole numbers whose true sum fits
there. Each member has an equal part of the range: with n members no value of one member, times its
weight, is beyond 1/n of it, whoever the others are. Every member sends every name of the round's
agreed set, zeros where it has nothing, so that which names it trained does not show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from orchard.trees import Tree

Vector: TypeAlias = npt.NDArray[np.uint32]
"""Whole numbers modulo 2**32, (n,)."""

_VALUES = 2**31 - 1  # the largest sum of values, which have a sign
_WEIGHTS = 2**32 - 1  # the largest sum of weights, which have none


@dataclass(frozen=True)
class FixedPoint:
    """How the members of one round write their updates.

    Attributes:
        shapes: Name to shape, of every name that a member sends.
        bound: The largest absolute value that an update may hold.
        max_weight: The largest weight that a name of an update may have.
        num_members: How many members there are at most.
    """

    shapes: Mapping[str, tuple[int, ...]]
    bound: float
    max_weight: float
    num_members: int

    def __post_init__(self) -> None:
        """Refuse what has no range.

        Raises:
            ValueError: A bound is not above 0 and finite, or there are no members or too many.
        """
        for name in ("bound", "max_weight"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}; give another")
        if not 0 < self.num_members <= 2**16:
            raise ValueError(
                f"members must be 1 to {2**16}, got {self.num_members}; more leave too few digits "
                "for each of them"
            )

    @property
    def largest_mean(self) -> float:
        """The largest absolute value of a mean of honest members, whose weights were rounded."""
        return 2 * self.bound

    @cached_property
    def names(self) -> Sequence[str]:
        """The names in the order of the vector."""
        return sorted(self.shapes)

    @property
    def length(self) -> int:
        """Numbers in a vector: all values, then a weight for each name."""
        return sum(map(math.prod, self.shapes.values())) + len(self.shapes)

    @property
    def _value_scale(self) -> float:
        """Whole numbers for a weighted value of 1."""
        return (_VALUES // self.num_members) / self.bound

    @property
    def _weight_scale(self) -> int:
        """Whole numbers for a weight of ``max_weight``."""
        return _WEIGHTS // self.num_members

    @property
    def precision(self) -> float:
        """The largest error of a mean of members who all have the largest weight.

        With smaller weights it grows as their mean shrinks.
        """
        rounded = 0.5 / self._value_scale + self.bound * 0.5 / self._weight_scale
        return rounded + 2.0**-24 * self.bound  # and the mean's own digits, in float32

    def encode(self, delta: Tree, weight: Mapping[str, float]) -> Vector:
        """Return an update as whole numbers, (length,).

        Args:
            delta: Name to tensor; names of the agreed set alone.
            weight: Name to weight, at least 0.

        Raises:
            ValueError: A name or shape is not agreed on, or a value or weight is beyond its bound.
        """
        if unknown := sorted(delta.keys() - self.shapes.keys()):
            raise ValueError(
                f"delta must hold names that the round agreed on, got {unknown[0]}; check the "
                "strategy"
            )
        values, weights = [], np.zeros(len(self.names), dtype=np.uint32)
        for place, name in enumerate(self.names):
            if name not in delta:
                values.append(np.zeros(math.prod(self.shapes[name]), dtype=np.uint32))
                continue
            values.append(self._encode_one(name, delta[name], weight[name]))
            weights[place] = round(weight[name] / self.max_weight * self._weight_scale)
        return np.concatenate([*values, weights])

    def _encode_one(self, name: str, tensor: torch.Tensor, weight: float) -> Vector:
        if tuple(tensor.shape) != self.shapes[name]:
            raise ValueError(
                f"{name} must have shape {self.shapes[name]}, got {tuple(tensor.shape)}; check "
                "that all clients run the same recipe"
            )
        least = self.max_weight / self._weight_scale
        if not (weight == 0 or least <= weight <= self.max_weight):
            raise ValueError(
                f"weight of {name} must be 0 or in {least:.3g}..{self.max_weight:g}, got {weight}; "
                "what a member may count for is agreed on before the round"
            )
        if weight == 0:
            return np.zeros(tensor.numel(), dtype=np.uint32)
        values = tensor.detach().double().cpu().numpy().reshape(-1)
        largest = float(np.abs(values).max(initial=0.0))
        if not largest <= self.bound:  # NaN too
            raise ValueError(
                f"values of {name} must be finite and within {self.bound:g}, got {largest:g}; "
                "raise privacy.secure_bound, which costs digits"
            )
        scale = weight / self.max_weight * self._value_scale
        return np.rint(values * scale).astype(np.int64).astype(np.uint32)

    def decode(self, total: Vector) -> dict[str, torch.Tensor]:
        """Return the weighted mean of every name that anybody sent, from the sum of all vectors.

        A name whose weights are all 0 is absent.

        Args:
            total: Sum modulo 2**32, (length,).
        """
        found: dict[str, torch.Tensor] = {}
        weights = total[len(total) - len(self.names) :].astype(np.float64) / self._weight_scale
        start = 0
        for name, weight in zip(self.names, weights, strict=True):
            number = math.prod(self.shapes[name])
            values = total[start : start + number].astype(np.int32).astype(np.float64)
            start += number
            if weight:
                mean = (values / self._value_scale / weight).astype(np.float32)
                found[name] = torch.from_numpy(mean.reshape(self.shapes[name]))
        return found
