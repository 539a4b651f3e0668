"""What a model keeps of the tokens it has read."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def can_be_continued(cache: Any) -> bool:
    """Say whether text of any length can follow prompts of different lengths, padded on the right.

    It can where every layer keeps an entry per token that a mask can hide; a window counts padding,
    and a state has read it.
    """
    return type(cache) is DynamicCache and all(type(own) is DynamicLayer for own in cache.layers)
