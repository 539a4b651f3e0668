"""Which model types of the installed transformers have experts, told from their config classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

_FIELD = re.compile(r"expert|moe", re.IGNORECASE)
_LANGUAGE = (
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
    transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)


def moe_types() -> Iterator[tuple[str, bool]]:
    """Yield every type with experts, and whether transformers has a language model of it."""
    for name in CONFIG_MAPPING.keys():  # noqa: SIM118 -- iterating over it leaves most out
        own: Any = CONFIG_MAPPING[name]
        if _has_experts(own):
            yield name, any(own in mapping for mapping in _LANGUAGE)


def text_parts(name: str) -> set[str]:
    """Return the types of the texts within a type."""
    found = set()
    for part in _parts(CONFIG_MAPPING[name]):
        found |= {part.model_type, *(own.model_type for own in _parts(part))}
    return found


def _has_experts(own: Any) -> bool:
    fields = {field for base in own.__mro__ for field in getattr(base, "__annotations__", {})}
    return any(map(_FIELD.search, fields)) or any(
        _has_experts(part) for part in _parts(own) if part is not own
    )


def _parts(own: Any) -> Iterator[Any]:
    for part in (getattr(own, "sub_configs", None) or {}).values():
        if inspect.isclass(part) and part.__name__ != "AutoConfig":
            yield part
    for part in (getattr(own, "sub_configs_defaults", None) or {}).values():
        name = getattr(part, "model_type", None)
        if not inspect.isclass(part) and name in CONFIG_MAPPING:
            yield CONFIG_MAPPING[name]
