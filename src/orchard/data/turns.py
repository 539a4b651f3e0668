"""One turn of a conversation, and text as messages show it."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one side of a conversation said.

    Attributes:
        role: Who spoke.
        text: What was said; never empty.
    """

    role: Role
    text: str


def shorten(text: str) -> str:
    """Return text as a message shows it, in quotes."""
    return repr(text) if len(text) <= 60 else repr(text[:57]) + "..."


# Signs that turn the direction in which what follows is written.
_TURNING = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def valid_name(name: str, *, where: str) -> str:
    """Return a name that a terminal, a table and a log can show as it is.

    Raises:
        ValueError: It has a control character, such as one that begins a terminal's commands, or a
            sign that turns the direction of writing.
    """
    for place, character in enumerate(name):
        if unicodedata.category(character) == "Cc" or character in _TURNING:
            raise ValueError(
                f"{where} must be a name that can be shown, got the character {character!a} at "
                f"place {place} of {name!a}; rename it"
            )
    return name


def valid_text(text: str, *, where: str) -> str:
    """Return text that can be encoded.

    Raises:
        ValueError: It holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} must be valid Unicode, got half of a surrogate pair at character "
            f"{error.start}; repair the text"
        ) from error
    return text
