"""A cache of keys and values whose rows join and leave.

Rows stand right-aligned: the newest token of every row is in the last column, and shorter rows
have padding before them, which a mask hides. So a row that joins needs nothing but padding, and
every family's own mask works.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from orchard.models.kernels.caches import cache_name

_SLACK = 64  # columns that are allocated ahead, so that a token seldom copies what is kept


class RowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, in buffers with room for more columns."""

    def __init__(self, **kwargs: Any) -> None:
        """Start empty."""
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []
        self._end = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the next columns and return all, each (B, heads, columns, width)."""
        fresh = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [_roomy(states, 0) for states in fresh]
            self._end = 0
        count = key_states.shape[-2]
        if self._end + count > self._buffers[0].shape[-2]:
            self._buffers = [_roomy(own[..., : self._end, :], count) for own in self._buffers]
        for own, states in zip(self._buffers, fresh, strict=True):
            own[..., self._end : self._end + count, :] = states
        self._end += count
        return self._show()

    def place(self, keys: Tensor, values: Tensor) -> None:
        """Hold these columns in the place of what was held."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._end = keys.shape[-2]
        self._buffers = [_roomy(keys, 0), _roomy(values, 0)]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (own[..., : self._end, :] for own in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def _roomy(states: Tensor, count: int) -> Tensor:
    """Return a copy with room for ``count`` columns and some more."""
    *front, columns, width = states.shape
    own = states.new_zeros(*front, columns + count + max(_SLACK, columns // 4), width)
    own[..., :columns, :] = states
    return own


def why_not_in_rows(model: nn.Module) -> str:
    """Say why rows of a model cannot join and leave; nothing where they can.

    A layer that sees a window of tokens keeps all of them here, and its mask hides the older ones:
    rows stand right-aligned, so columns are as far from each other as tokens are.
    """
    network: Any = model
    supports = getattr(network, "_supports_default_dynamic_cache", None)
    if network.config.is_encoder_decoder or supports is None or not supports():
        return "it is no decoder with a cache of keys and values"
    needed = {"position_ids", "logits_to_keep"}
    if lacking := needed - inspect.signature(network.forward).parameters.keys():
        return f"its forward pass has no argument {', '.join(sorted(lacking))}"
    if cache_name(network) is None:
        return "its forward pass has no argument for a cache"
    cache = DynamicCache(config=network.config)
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or any(type(own) not in known for own in cache.layers):
        return "it keeps a state of what it has read"
    return ""


def empty_cache() -> Any:
    """Return a cache without rows, for any model with an entry per token in every layer."""
    return Cache(layer_class_to_replicate=RowLayer)


def joined(caches: Sequence[Any]) -> Any:
    """Return one cache with the rows of several behind each other."""
    if len(caches) == 1:
        return caches[0]
    width = max(cache.get_seq_length() for cache in caches)
    whole = empty_cache()
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer = RowLayer()
        layer.place(
            torch.cat([_aligned(own.keys, width) for own in layers]),
            torch.cat([_aligned(own.values, width) for own in layers]),
        )
        whole.layers.append(layer)
    return whole


def selected(cache: Any, rows: Tensor, *, width: int) -> None:
    """Keep these rows alone, and of them the last ``width`` columns."""
    for layer in cache.layers:
        start = layer.keys.shape[-2] - width
        layer.place(layer.keys[rows, :, start:], layer.values[rows, :, start:])


def _aligned(states: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
