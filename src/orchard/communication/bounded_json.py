"""JSON of somebody who may mean harm: bounded before it is parsed, and read one way only.

A parser's own bounds are not ours. ``json`` takes 60,000 brackets for a reason to end the process'
recursion, keeps the last of two equal keys where another reader keeps the first, and reads
``Infinity``, which is no JSON. Here length and depth are looked at before anything is built, and
what could be read in two ways is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

MAX_DEPTH = 8
"""Objects and lists in each other. No message of ours has more than four."""

# A string, or what is left of one: it always matches, so that a text is read once.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in _STEP)


def read_json(text: bytes | str, *, max_bytes: int) -> Any:
    """Return what JSON of a bounded length says.

    Args:
        text: UTF-8.
        max_bytes: Longest text that is looked at.

    Raises:
        ValueError: It is longer, nested deeper than ``MAX_DEPTH``, no JSON, has a key twice in one
            object, or a number that is none.
    """
    if len(text) > max_bytes:
        raise ValueError(f"JSON must have at most {max_bytes} bytes, got {len(text)}")
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(content) > max_bytes:
        raise ValueError(f"JSON must have at most {max_bytes} bytes, got {len(content)}")
    brackets = _STRING.sub(b"", content).translate(None, _NOT_BRACKETS)
    depth = max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
    if depth > MAX_DEPTH:
        raise ValueError(f"JSON must be nested at most {MAX_DEPTH} deep, got {depth}")
    return _DECODER(content.decode())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("JSON must have each key of an object once, got one twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"JSON must have finite numbers, got {name}")


_DECODER: Callable[[str], Any] = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant
).decode
