"""Frozen experts in fewer bits: how one expert's slice is kept, and how it is read back.

*int8*: each row of a slice is divided by its largest magnitude and rounded to one of 255 steps, so
that no value is off by more than half a step, 1/254 of that magnitude. *nf4*: blocks of 64 values
are divided by their largest magnitude and rounded to one of sixteen levels, the quantiles of a
normal distribution, by bitsandbytes. The widest gap between levels is that from -1 to -0.6962, so
no value is off by more than 0.152 of its block's magnitude.

Both are read back to the model's dtype before a product, so all that trains, and a graft that
starts as such an expert, computes in full. Biases stay as they are.

Source: Dettmers et al., 2022, LLM.int8(), arXiv:2208.07339, for rows; Dettmers et al., 2023, QLoRA,
arXiv:2305.14314, for NF4, without its second quantization of the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orchard.extras import require

PRECISIONS = ("bf16", "int8", "nf4")
_BLOCK = 64  # of NF4; each has a scale of 32 bits
_STEPS = 127
Part = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a part of one slice."""


def check_precision(precision: str) -> None:
    """Check that this machine can keep experts so.

    Raises:
        ValueError: What it needs is not installed.
    """
    if precision == "nf4":
        require("quantize", to="keep experts in nf4")


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
    return {
        "nf4": ((-(-count // 2),), torch.uint8),
        "scale": ((-(-count // _BLOCK),), torch.float32),
    }


def encode(precision: str, values: Tensor) -> dict[str, Tensor]:
    """Return the parts of one slice."""
    if precision == "bf16" or values.ndim < 2:
        return {"": values}
    if precision == "int8":
        wide = values.float()
        scale = wide.abs().amax(dim=-1)
        steps = wide * (_STEPS / scale.clamp(min=torch.finfo(torch.float32).tiny))[..., None]
        return {"int8": steps.round_().to(torch.int8), "scale": scale}
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(values.contiguous(), blocksize=_BLOCK, quant_type="nf4")
    return {"nf4": packed.flatten(), "scale": state.absmax.float()}


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
    from bitsandbytes.functional import QuantState, dequantize_4bit

    about: Any = {"blocksize": _BLOCK, "quant_type": "nf4"}
    state = QuantState(parts["scale"], shape=torch.Size(shape), dtype=dtype, **about)  # type: ignore[no-untyped-call]
    return dequantize_4bit(parts["nf4"][:, None], state)
