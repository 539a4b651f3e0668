"""How an option says its default, its meaning, and the values that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any, TypeAlias

Scalar: TypeAlias = str | int | float | bool


def option(
    default: Scalar,
    about: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Any:
    """Describe one option: its default, its meaning, and what values it takes.

    ``minimum`` and ``maximum`` are allowed values; ``above`` is not.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    return field(default=default, metadata={"about": about, **limits})
