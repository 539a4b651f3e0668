"""Whether the files of a site are still those that its worker has read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from orchard.deployment.consent import Consent

FileState: TypeAlias = tuple[int, ...]
"""Inode, size and times of a file: whoever changes one changes this. Empty = it is not there."""


def states_of(consent: Consent) -> tuple[FileState, ...]:
    """Return how the owner's files stand: rows, calibration, retention and data section."""
    named = (consent.data, consent.calibration, consent.retention, consent.data_recipe)
    return tuple(_state(Path(path)) for path in named if path)


def _state(path: Path) -> FileState:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
