"""The parts that frozen experts are kept in, by parameter: mapped from disk, or in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from orchard.models.stored.conversion import StoredExperts, StoredModel
from orchard.models.stored.expert_cache import open_cache, read_slice
from orchard.models.stored.mapping import map_tensors
from orchard.models.stored.precision import decode, encode, parts_of
from orchard.trees import SlicedTensor

Parts = dict[str, dict[str, Tensor]]
"""The model's name of a fused parameter to its parts of all experts; "" = kept whole."""


def map_parts(
    stored: StoredModel, dtypes: Mapping[str, torch.dtype], *, precision: str, folder: str
) -> Parts:
    """Return parts as they lie in the fused cache, which is made where there is none.

    Raises:
        ValueError: See ``open_cache``.
    """
    cache = open_cache(stored, dtypes, precision=precision, folder=folder)
    places = {(n, part): own for n, parts in cache.parts.items() for part, own in parts.items()}
    mapped = dict(zip(places, map_tensors(places.values()), strict=True))
    return {n: {part: mapped[n, part] for part in own} for n, own in cache.parts.items()}


def read_parts(
    stored: StoredModel,
    dtypes: Mapping[str, torch.dtype],
    *,
    precision: str,
    empty: Callable[[tuple[int, ...], torch.dtype], Tensor],
) -> Parts:
    """Read all experts, one after another.

    Args:
        stored: The checkpoint.
        dtypes: Fused parameters to the dtype that the model has them in.
        precision: What they are kept in, of ``PRECISIONS``.
        empty: From shape and dtype to the memory for a part of all experts.

    Raises:
        ValueError: One is not finite.
    """
    found: Parts = {}
    for name, experts in stored.experts.items():
        number, dtype = experts.shape[0], dtypes[name]
        parts = {
            part: empty((number, *shape), own)
            for part, (shape, own) in parts_of(precision, experts.shape[1:], dtype).items()
        }
        for expert in range(number):
            values = read_slice(stored, experts, expert, dtype)
            for part, tensor in encode(precision, values).items():
                parts[part][expert] = tensor
        found[name] = parts
    return found


def decoded(
    parts: Mapping[str, Tensor],
    experts: StoredExperts,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
) -> SlicedTensor:
    """Return what reads one expert's slice back.

    Args:
        parts: Of all experts.
        experts: Of which parameter.
        dtype: Of the model.
        device: Where it is read to; None = where the parts are.
    """
    shape, own = experts.shape, next(iter(parts.values())).device
    target = own if device is None else device

    def read(expert: int) -> Tensor:
        slices = {part: stack[expert].to(target) for part, stack in parts.items()}
        return decode(slices, shape[1:], dtype)

    return SlicedTensor(torch.Size(shape), dtype, target, read)
