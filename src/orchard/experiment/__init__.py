"""A recipe becomes objects, here and nowhere else; it knows everything below and no command."""

from __future__ import annotations

from orchard.moved import missing


def __getattr__(name: str) -> object:
    raise missing(__name__, name)
