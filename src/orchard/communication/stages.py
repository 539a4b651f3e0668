"""What a stage is, and the plainest: a cast to the dtype of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from orchard.trees import Tree, map_tree

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESERVED = "#"
"""How names begin that a stage adds beside those of the tree."""
# Of a tensor in a message's header: dtype, shape and offsets, beside its name; and its weight.
_ENTRY, _WEIGHT = 80, 16


@dataclass(frozen=True)
class Size:
    """What one tensor takes on the wire, without its name.

    Attributes:
        values: Numbers sent of it.
        width: Bytes of each.
        beside: Bytes that say how to read them.
    """

    values: int
    width: int = 4
    beside: int = 0

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.values * self.width + self.beside


class Stage(Protocol):
    """One step on the way: ``encode`` at the sender, ``decode`` at the receiver.

    Values are finite; ``Codec`` sees to that on both sides. Encoding is deterministic, and each
    tensor is encoded by itself. Tensors of integers cross as they are. What is decoded may come
    from anybody, so it is checked before any memory is taken that the message claims to need.
    """

    def encode(self, tree: Tree) -> Tree:
        """Return what is sent for ``tree``."""

    def decode(self, tree: Tree) -> Tree:
        """Return what the receiver takes ``tree`` for, floating tensors in float32.

        Raises:
            ValueError: ``encode`` makes no such tree.
        """

    def size(self, size: Size) -> Size:
        """Return what ``encode`` makes of a floating tensor of this size."""


def payload_bytes(stages: tuple[Stage, ...], num_values: int) -> int:
    """Return the bytes that stages make of a float32 tensor, without its name."""
    size = Size(num_values)
    for stage in stages:
        size = stage.size(size)
    return size.total


def message_bytes(
    elements: Mapping[str, int], stages: tuple[Stage, ...], *, has_weights: bool
) -> int:
    """Return the length of a message, but for what it holds beside tensors.

    Args:
        elements: Name to number of values, of each floating tensor.
        stages: What encodes it.
        has_weights: Whether names have weights, as in an update.
    """
    payload = sum(payload_bytes(stages, number) for number in elements.values())
    header = sum(len(name) + _ENTRY for name in elements)
    if has_weights:  # which repeat the names
        header += sum(len(name) + _WEIGHT for name in elements)
    return payload + header


@dataclass(frozen=True)
class Cast:
    """Send floating tensors in ``dtype``, receive float32.

    Exact for float32. For bfloat16 the error of a value is at most 2^-8 of its size, or 2^-126
    where that is more; what is beyond bfloat16's largest number is sent as that number.
    """

    dtype: torch.dtype

    def encode(self, tree: Tree) -> Tree:
        """Cast to ``dtype``."""
        limit = torch.finfo(self.dtype).max

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point() or tensor.dtype == self.dtype:
                return tensor
            return tensor.float().clamp(-limit, limit).to(self.dtype)

        return map_tree(cast, tree)

    def decode(self, tree: Tree) -> Tree:
        """Cast to float32."""
        return map_tree(lambda t: t.float() if t.is_floating_point() else t, tree)

    def size(self, size: Size) -> Size:
        """Change the width."""
        return replace(size, width=self.dtype.itemsize)
