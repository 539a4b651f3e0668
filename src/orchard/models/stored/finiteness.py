"""Weights are numbers: NaN and infinity in a base are found while it is loaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_SHOWN = 6  # names in a message; the count of all is beside them


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor holds neither NaN nor infinity.

    Its extremes tell, in one pass and without a second tensor of its size.
    """
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def check_finite(named: Iterable[tuple[str, Tensor]], *, path: str) -> None:
    """Refuse weights that are not finite.

    Args:
        named: Tensors by name.
        path: What the user calls the checkpoint.

    Raises:
        ValueError: There are such; the message has the names.
    """
    bad = [name for name, tensor in named if not is_finite(tensor)]
    if not bad:
        return
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    raise ValueError(
        f"model.path must hold finite weights, got NaN or infinity in {path}: "
        f"{', '.join(bad[:_SHOWN])}{more}; download it again, or choose another checkpoint"
    )
