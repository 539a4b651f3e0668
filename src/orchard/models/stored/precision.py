"""Frozen experts in fewer bits: how one expert's slice is kept, and how it is read back.

*int8*: each row of a slice is divided by its largest magnitude and rounded to one of 255 steps, so
that no value is off by more than half a step, 1/254 of that magnitude. *nf4*: blocks of 64 values
are divided by their largest magnitude and rounded to one of sixteen levels, the quantiles of a
normal distribution. The widest gap between levels is that from -1 to -0.6962, so
no value is off by more than 0.152 of its block's magnitude.

Both are read back to the model's dtype before a product, so all that trains, and a graft that
starts as such an expert, computes in full. Biases stay as they are.

These are kernels of our own because bitsandbytes, the library for it, walks ``nn.Linear`` alone,
and where it is installed PEFT imports it into every process.

Source: Dettmers et al., 2022, LLM.int8(), arXiv:2208.07339, for rows; Dettmers et al., 2023, QLoRA,
arXiv:2305.14314, for NF4, without its second quantization of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PRECISIONS = ("bf16", "int8", "nf4")
_BLOCK = 64  # of NF4; each has a scale of 32 bits
_STEPS = 127
# Of NF4; from the paper's appendix E, as bitsandbytes has them.
_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a part of one slice."""


def parts_of(precision: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Part]:
    """Return the parts that one slice is kept in, by name; "" is the slice itself.

    Args:
        precision: Of ``PRECISIONS``.
        shape: Of the slice.
        dtype: Of the model.
    """
    if precision == "bf16" or len(shape) < 2:
        return {"": (shape, dtype)}
    if precision == "int8":
        return {"int8": (shape, torch.int8), "scale": (shape[:-1], torch.float32)}
    count = torch.Size(shape).numel()
    num_blocks = -(-count // _BLOCK)
    return {
        "nf4": ((num_blocks, _BLOCK // 2), torch.uint8),
        "scale": ((num_blocks,), torch.float32),
    }


def bytes_per_value(precision: str) -> float:
    """Return what a value of a large slice takes in few bits, scales included."""
    count = 1 << 20
    parts = parts_of(precision, (count // 1024, 1024), torch.float32).values()
    return sum(torch.Size(shape).numel() * own.itemsize for shape, own in parts) / count


def encode(precision: str, values: Tensor) -> dict[str, Tensor]:
    """Return the parts of one slice."""
    if precision == "bf16" or values.ndim < 2:
        return {"": values}
    if precision == "int8":
        wide = values.float()
        scale = wide.abs().amax(dim=-1)
        steps = wide * (_STEPS / scale.clamp(min=torch.finfo(torch.float32).tiny))[..., None]
        return {"int8": steps.round_().to(torch.int8), "scale": scale}
    flat = values.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    scale = blocks.abs().amax(dim=-1)
    shares = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    levels = torch.tensor(_LEVELS, device=values.device)
    codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return {"nf4": codes[:, ::2] * 16 + codes[:, 1::2], "scale": scale}


def decode(parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the slice that parts are of, on their device.

    Args:
        parts: As ``encode`` returned them.
        shape: Of the slice.
        dtype: Of the model.
    """
    if "" in parts:
        return parts[""]
    if "int8" in parts:
        wide = parts["int8"].float()
        return wide.mul_((parts["scale"] / _STEPS)[..., None]).to(dtype)
    packed = parts["nf4"]
    levels = torch.tensor(_LEVELS, device=packed.device)
    # Two levels to each byte: one look-up gives both.
    pairs = torch.cartesian_prod(levels, levels)
    wide = pairs.index_select(0, packed.flatten().int()).view(len(packed), _BLOCK)
    wide *= parts["scale"][:, None]
    return wide.flatten()[: torch.Size(shape).numel()].view(shape).to(dtype)
