"""What a name says of experts."""

from __future__ import annotations

import re
from typing import TypeAlias

Expert: TypeAlias = tuple[str, int]
"""The name of a MoE layer, and an expert of it, as the checkpoint counts."""

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.")
_ROUTER = re.compile(r"(.+)\.router(?:_bias)?\.(?:(\d+)(?:\.|$))?")


def expert_of(name: str) -> Expert | None:
    """Return layer and expert that a name belongs to, or None where it belongs to none."""
    match = _EXPERT.match(name)
    return (match[1], int(match[2])) if match else None


def is_router(name: str) -> bool:
    """Say whether a name belongs to a router."""
    return _ROUTER.match(name) is not None


def router_row_of(name: str) -> Expert | None:
    """Return the expert whose row of a router a name is, or None where it is no such row.

    The factor A of a router's adapter is none: all rows share it.
    """
    match = _ROUTER.match(name)
    return (match[1], int(match[2])) if match and match[2] else None
