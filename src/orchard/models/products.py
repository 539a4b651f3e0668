"""Products with frozen matrices, in the precision that a machine is fast in."""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Return what matrices of this dtype are best multiplied in on this device.

    Products in bfloat16 sum in float32 anyway and round once at the end. A CPU without instructions
    for it takes several times as long for that as for widening both factors first.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or _has_bfloat16():
        return x.dtype
    return torch.float32


def multiply_into(out_TN: Tensor, x_TM: Tensor, matrix_MN: Tensor) -> None:
    """Write ``x_TM @ matrix_MN`` to ``out_TN``, rounded once.

    Args:
        out_TN: Written to; may be narrower than ``x_TM``.
        x_TM: In ``product_dtype``.
        matrix_MN: Of any dtype.
    """
    matrix_MN = matrix_MN.to(x_TM.dtype)
    if out_TN.dtype == x_TM.dtype:
        torch.mm(x_TM, matrix_MN, out=out_TN)
    else:
        out_TN.copy_(x_TM @ matrix_MN)


def _has_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
