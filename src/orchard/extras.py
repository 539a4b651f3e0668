"""Packages that only some of Orchard needs: what brings them, and what is said where they lack."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

EXTRAS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "flower": ("flwr", "cryptography", "httpx", "uvicorn"),
        "report": ("matplotlib",),
    }
)
"""Name of an extra in pyproject.toml to the modules that Orchard imports from it."""


def lacking(extra: str) -> tuple[str, ...]:
    """Return the modules of an extra that are not installed; none is imported."""
    return tuple(name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None)


def require(extra: str, *, to: str) -> None:
    """Refuse to go on without an extra, or with a part of one.

    Args:
        extra: Of ``EXTRAS``.
        to: What it is needed for, such as ``leave one machine``.

    Raises:
        ValueError: A module of it is not installed.
    """
    if missing := lacking(extra):
        raise ValueError(
            f"{', '.join(missing)} must be installed to {to}, got no such package; install "
            f"Orchard with its extra {extra}, such as pip install '.[{extra}]' in its checkout"
        )
