"""What a person reads when a command fails: one line, and the exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

BAD_INPUT, FAILED = 2, 1


@contextmanager
def clear_errors(*, code: int, traceback: bool) -> Iterator[None]:
    """Print the message of a library error alone and leave with ``code``."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if traceback:
            raise
        text = " ".join(str(error).split())
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"error: {text}{notes}", file=sys.stderr)
        raise typer.Exit(code) from None
