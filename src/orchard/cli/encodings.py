"""Terminals that do not know every character: what they are given in its place."""

from __future__ import annotations

import codecs
import io
import sys

# Of what Orchard and its libraries write themselves; anything else becomes its number.
_PLAIN = {
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{PLUS-MINUS SIGN}": "+-",
    "\N{MIDDLE DOT}": "-",
    "\N{BULLET}": "*",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{RIGHTWARDS ARROW}": "->",
}
_HANDLER = "orchard.plain"


def write_what_the_terminal_knows() -> None:
    """Let standard output and error write every text, whatever their encoding.

    With ``LC_ALL=C`` or in a terminal of Latin-1 a letter of a client's name must not end a run.
    """
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    found = (
        _PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode("ascii")
        for one in unknown
    )
    return "".join(found), error.end
