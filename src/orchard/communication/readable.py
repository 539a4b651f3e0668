"""Texts of the other side, fit for a log, a terminal, an audit or a table."""

from __future__ import annotations

MAX_TEXT = 300
"""Longest text of the other side that is written down, in characters."""


def readable(text: str, *, limit: int = MAX_TEXT) -> str:
    """Return a text on one line of at most ``limit`` characters, all of which can be seen.

    What is no printable character (a newline, an escape sequence of a terminal, a sign that turns
    the direction of writing, half a surrogate pair) is written as its number. A text that is cut
    ends with how long it was.
    """
    end = f"... ({len(text)} characters)"
    # Cut first: a long text costs no more than a short one.
    shown = "".join(map(_shown, text[: limit + 1]))
    if len(text) <= limit and len(shown) <= limit:
        return shown
    kept = shown[: max(limit - len(end), 0)]
    return kept + end[: limit - len(kept)]


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
