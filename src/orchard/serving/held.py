"""Experts of a base that is served, where its memory has them and where it has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from orchard.models.view.held import HeldExperts
from orchard.models.view.moe import MoELayer

_NUM_KEPT = 8
"""Of a layer whose experts are not in memory, so many of those that grafts started as are."""


class _Read(Sequence[Mapping[str, Tensor]]):
    """Experts that are read one by one, of which the last used are kept."""

    def __init__(self, layer: MoELayer) -> None:
        self._num_experts = layer.num_experts
        self._read = lru_cache(maxsize=_NUM_KEPT)(layer.expert_tensors)

    def __len__(self) -> int:
        return self._num_experts

    def __getitem__(self, expert: Any) -> Any:
        return self._read(expert)


def experts_of(layer: MoELayer) -> Sequence[Mapping[str, Tensor]]:
    """Return the tensors of each expert of a layer; what memory does not have is read when used."""
    if isinstance(layer.storage, HeldExperts):
        return _Read(layer)
    return [layer.expert_tensors(index) for index in range(layer.num_experts)]
