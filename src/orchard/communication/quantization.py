"""Eight bits for each value, and a scale for each block of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from orchard.communication.stages import Size
from orchard.trees import Tree

_SCALES = "#scales"
_LEVELS = 127
_SMALLEST_SCALE = 2.0**-126  # below it float32 loses precision, and its reciprocal range
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Int8:
    """Send floating tensors in 8 bits, in blocks of their values in order; receive float32.

    A block is sent as integers in -127..127 and the bfloat16 nearest to its largest magnitude over
    127, rounded to nearest, ties to even. The error of a value is at most 1/254 of the largest
    magnitude of its block times 1 + 2^-8 (the rounding of the scale), or 2^-119 where that is
    more: a block of such small values arrives as zeros. A block of zeros arrives exactly.

    On the wire: each tensor as int8 in its own shape; the scales of all, in the order of sorted
    names, as one tensor.

    Attributes:
        block: Values that share a scale. 128 make the scales 1.6 % of the values; the error of a
            value grows with its block's largest.
    """

    block: int = 128

    def encode(self, tree: Tree) -> Tree:
        """Divide by the scales and round.

        Raises:
            ValueError: A tensor is int8 already, and would be taken for an encoded one.
        """
        sent, scales = {}, []
        for name in sorted(tree):
            tensor = tree[name]
            if tensor.dtype == torch.int8:
                raise ValueError(
                    f"{name} must not be int8 under communication.dtype = int8, got integers of "
                    "that type; send them as int16"
                )
            if not tensor.is_floating_point():
                sent[name] = tensor
                continue
            sent[name], scale = _quantize(tensor.detach().float(), self.block)
            scales.append(scale)
        return {**sent, _SCALES: torch.cat(scales)} if scales else sent

    def decode(self, tree: Tree) -> Tree:
        """Multiply by the scales.

        Raises:
            ValueError: There is not one finite scale of at least 0 for each block.
        """
        names = [name for name in sorted(tree) if tree[name].dtype == torch.int8]
        floating = sorted(n for n, t in tree.items() if t.is_floating_point() and n != _SCALES)
        if floating:
            raise ValueError(
                f"{floating[0]} must arrive as int8, got {tree[floating[0]].dtype}; "
                "check that both sides run the same recipe"
            )
        blocks = [-(-tree[name].numel() // self.block) for name in names]
        scales = tree.get(_SCALES, torch.zeros(0, dtype=torch.bfloat16))
        if scales.dtype != torch.bfloat16 or scales.shape != (sum(blocks),):
            raise ValueError(
                f"message must have {sum(blocks)} bfloat16 scales for its int8 values, got "
                f"{scales.numel()} of {scales.dtype}; check that both sides run the same recipe"
            )
        scales = scales.float()
        if not bool((scales.isfinite() & (scales >= 0)).all()):
            raise ValueError(
                "scales of int8 values must be finite and at least 0, got others; resend them"
            )
        received = {n: t for n, t in tree.items() if t.dtype != torch.int8 and n != _SCALES}
        for name, own in zip(names, torch.split(scales, blocks), strict=True):
            received[name] = _restore(tree[name], own, self.block)
        return received

    def size(self, size: Size) -> Size:
        """One byte for each value, two for each block."""
        num_blocks = -(-size.values // self.block)
        return replace(size, width=1, beside=size.beside + 2 * num_blocks)


def _in_blocks(flat: Tensor, block: int) -> Tensor:
    missing = -flat.numel() % block
    return (functional.pad(flat, (0, missing)) if missing else flat).view(-1, block)


def _quantize(tensor: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return int8 in the shape of a float32 tensor, and the scales of its blocks."""
    if tensor.numel() == 0:
        return tensor.to(torch.int8), torch.zeros(0, dtype=torch.bfloat16, device=tensor.device)
    values = _in_blocks(tensor.reshape(-1), block)
    scales = (values.abs().amax(dim=1) / _LEVELS).to(torch.bfloat16)
    scales = torch.where(scales < _SMALLEST_SCALE, torch.zeros_like(scales), scales)
    factors = torch.where(scales > 0, 1 / scales.float(), torch.zeros(()))
    levels = (values * factors[:, None]).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)
    return levels.view(-1)[: tensor.numel()].view(tensor.shape), scales


def _restore(levels: Tensor, scales: Tensor, block: int) -> Tensor:
    if levels.numel() == 0:
        return levels.float()
    values = _in_blocks(levels.reshape(-1), block).float().mul_(scales[:, None])
    # A scale that was rounded up may lift the largest float32 numbers beyond the last one.
    values.clamp_(-_LARGEST, _LARGEST)
    return values.view(-1)[: levels.numel()].view(levels.shape)
