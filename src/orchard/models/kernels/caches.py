"""What a model keeps of the tokens it has read."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# What transformers calls a cache, taken and returned: since 5.24, and before.
_NAMES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str | None:
    """Return the name under which a model takes and returns its cache; None where it takes none."""
    arguments = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in arguments), None)


def why_not_continued(model: nn.Module) -> str:
    """Say why nothing can follow what a model has read of several prompts; nothing where it can."""
    network: Any = model
    if cache_name(network) is None:
        return "its forward pass has no argument for a cache"
    if not can_be_continued(DynamicCache(config=network.config)):
        return "it keeps a state, or a window of tokens"
    return ""


def can_be_continued(cache: Any) -> bool:
    """Say whether text of any length can follow prompts of different lengths, padded on the right.

    It can where every layer keeps an entry per token that a mask can hide; a window counts padding,
    and a state has read it.
    """
    return type(cache) is DynamicCache and all(type(own) is DynamicLayer for own in cache.layers)
