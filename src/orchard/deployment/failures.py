"""What went wrong at a site, as a code that may leave it."""

from __future__ import annotations

import errno

from orchard.communication.refusals import Code
from orchard.deployment.consent import Refusal
from orchard.recipe.reading import known_options

_FULL = (errno.ENOSPC, errno.EDQUOT)


def code_of(error: BaseException) -> Code:
    """Return the code of a failure."""
    if isinstance(error, FloatingPointError):
        return Code.DIVERGED
    # torch says it in words where it has no type for it.
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return Code.NO_MEMORY
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return Code.NO_MEMORY
    if isinstance(error, OSError) and error.errno in _FULL:
        return Code.NO_SPACE
    return Code.FAILED


def option_in(message: str) -> str:
    """Return the option that a message begins with; empty where it begins otherwise.

    Only names of options are returned, whatever else the message holds.
    """
    first = message.split(maxsplit=1)[0] if message.strip() else ""
    return first if first in known_options() else ""


def as_refusal(code: Code, error: Exception) -> Refusal:
    """Return a refusal that keeps an error's message at the site."""
    return Refusal(code, f"{type(error).__name__}: {error}", option=option_in(str(error)))


def in_words(error: BaseException) -> str:
    """Return an error with its notes, for the site's own log."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}{notes}"
