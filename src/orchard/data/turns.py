"""One turn of a conversation, and text as messages show it."""

from __future__ import annotations

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
