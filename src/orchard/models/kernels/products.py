"""Products with frozen matrices, in the precision that a machine is fast in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A widened block of a matrix: small enough that the C library reuses its memory without asking the
# system for fresh pages, which took longer than the widening.
_BLOCK_BYTES = 8 << 20
# Below so many rows, widening a matrix takes longer than it saves.
_FEWEST_ROWS = 8


def is_slow(tensor: Tensor) -> bool:
    """Say whether products of this dtype are better made in float32 on this device.

    Products in bfloat16 sum in float32 anyway and round once at the end. A CPU without instructions
    for it takes several times as long for that as for widening both factors first.
    """
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not _has_bfloat16()


def multiply_rows(x_TM: Tensor, matrix_NM: Tensor, *, out_TN: Tensor | None = None) -> Tensor:
    """Return ``x_TM @ matrix_NM.t()``, rounded once.

    Args:
        x_TM: Of the matrix's dtype.
        matrix_NM: Frozen, as ``nn.Linear`` holds it.
        out_TN: Where to write it; may be float32, and then nothing is rounded. None = anew.
    """
    if len(x_TM) < _FEWEST_ROWS or not is_slow(matrix_NM):
        if out_TN is None or out_TN.dtype != x_TM.dtype:
            y_TN = x_TM @ matrix_NM.t()
            return y_TN if out_TN is None else out_TN.copy_(y_TN)
        return torch.mm(x_TM, matrix_NM.t(), out=out_TN)
    wide_TM = x_TM.float()
    is_wide = out_TN is not None and out_TN.dtype == torch.float32
    wide_TN = out_TN if is_wide else wide_TM.new_empty(len(x_TM), len(matrix_NM))
    assert wide_TN is not None
    for part, block_BM in _widened(matrix_NM):
        torch.mm(wide_TM, block_BM.t(), out=wide_TN[:, part])
    if is_wide:
        return wide_TN
    return wide_TN.to(x_TM.dtype) if out_TN is None else out_TN.copy_(wide_TN)


def multiply_back(y_TN: Tensor, matrix_NM: Tensor, *, out_TM: Tensor | None = None) -> Tensor:
    """Return ``y_TN @ matrix_NM``, rounded once: the gradient through ``multiply_rows``.

    Args:
        y_TN: Of the matrix's dtype, or float32.
        matrix_NM: Frozen, as ``nn.Linear`` holds it.
        out_TM: Where to write it, of the matrix's dtype; None = anew.
    """
    if len(y_TN) < _FEWEST_ROWS or not is_slow(matrix_NM):
        y_TN = y_TN.to(matrix_NM.dtype)
        return y_TN @ matrix_NM if out_TM is None else torch.mm(y_TN, matrix_NM, out=out_TM)
    wide_TN = y_TN.float()
    sum_TM = wide_TN.new_zeros(len(y_TN), matrix_NM.shape[1])
    for part, block_BM in _widened(matrix_NM):
        sum_TM.addmm_(wide_TN[:, part], block_BM)
    return sum_TM.to(matrix_NM.dtype) if out_TM is None else out_TM.copy_(sum_TM)


def _widened(matrix_NM: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a matrix in float32, some rows at a time, each in the memory of the one before."""
    num_rows, width = matrix_NM.shape
    step = max(1, _BLOCK_BYTES // (4 * width))
    memory_BM = torch.empty(min(step, num_rows), width)
    for start in range(0, num_rows, step):
        part = slice(start, min(start + step, num_rows))
        yield part, memory_BM[: part.stop - start].copy_(matrix_NM[part])


def _has_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
