"""Arithmetic on named tensors.

A *tree* maps names such as ``layers.3.self_attn.q_proj.lora_A`` to tensors. Trees are plain
mappings; the functions here never change their arguments and keep the order of names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

Tree: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Widened(Mapping[str, torch.Tensor]):
    """A tree in float32 of one in fewer bits: each tensor is widened when it is read, and not kept.

    Attributes:
        stored: The tree as it is in memory; integers stay what they are.
    """

    stored: Tree

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor, in float32 if it is floating."""
        tensor = self.stored[name]
        return tensor.float() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        """Go through the names in their order."""
        return iter(self.stored)

    def __len__(self) -> int:
        """Return how many names there are."""
        return len(self.stored)


@dataclass(frozen=True, eq=False)
class SlicedTensor:
    """A tensor that is elsewhere, and read one slice of its first dimension at a time.

    It is indexed as a tensor is, and what it returns is memory of its own or a view of a file.

    Attributes:
        shape: Of all.
        dtype: Of what is read.
        device: Of what is read.
        read: From an index to the slice.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    read: Callable[[int], torch.Tensor]
    requires_grad: bool = False

    def __len__(self) -> int:
        """Return how many slices there are."""
        return self.shape[0]

    def __getitem__(self, index: int | torch.Tensor) -> torch.Tensor:
        """Read one slice."""
        return self.read(int(index))

    @property
    def mT(self) -> SlicedTensor:
        """Each slice transposed, as a view of it."""
        shape = torch.Size((*self.shape[:-2], self.shape[-1], self.shape[-2]))
        read = self.read
        return SlicedTensor(shape, self.dtype, self.device, lambda index: read(index).mT)

    def unbind(self) -> SlicedTensor:
        """Return what gives a slice for an index: itself."""
        return self


def map_tree(
    function: Callable[[torch.Tensor], torch.Tensor], tree: Tree
) -> dict[str, torch.Tensor]:
    """Apply ``function`` to every tensor of ``tree``."""
    return {name: function(tensor) for name, tensor in tree.items()}


def subtract(left: Tree, right: Tree) -> dict[str, torch.Tensor]:
    """Return ``left - right`` for the names of ``left``, in float32.

    Raises:
        KeyError: A name of ``left`` is missing in ``right``.
    """
    return {name: left[name].float() - right[name].float() for name in left}


def zeros_like(tree: Tree) -> dict[str, torch.Tensor]:
    """Return float32 zeros in the shapes of ``tree``."""
    return {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in tree.items()}


def clone(tree: Tree) -> dict[str, torch.Tensor]:
    """Return a tree with its own memory, detached from any graph."""
    return {name: tensor.detach().clone() for name, tensor in tree.items()}


def select(tree: Tree, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the part of ``tree`` with these names, in their order.

    Raises:
        KeyError: A name is missing in ``tree``.
    """
    return {name: tree[name] for name in names}


def squared_norm(tree: Tree) -> float:
    """Return the squared L2 norm over all values, summed in float64."""
    return math.fsum(float(tensor.double().square().sum()) for tensor in tree.values())


def equal(left: Tree, right: Tree) -> bool:
    """Say whether two trees have the same names, shapes, dtypes and bits."""
    return digest(left) == digest(right)


def digest(tree: Mapping[str, torch.Tensor | SlicedTensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bits, as 64 hexadecimal digits.

    Independent of the order of names and of the device. A tensor is read as bytes, so two trees
    with equal digests are bit-identical (NaN payloads and signed zeros included).
    """
    sha = hashlib.sha256()
    for name in sorted(tree):
        tensor = tree[name]
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        parts = (
            map(tensor.read, range(len(tensor))) if isinstance(tensor, SlicedTensor) else [tensor]
        )
        for part in parts:
            own = part.detach().cpu().contiguous()
            # Without a copy: a tensor may be larger than what memory is left.
            sha.update(own.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
