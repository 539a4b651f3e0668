"""JSON Lines and JSON arrays, row by row; numbers as their text in the file."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from orchard.data.turns import shorten

Parsed: TypeAlias = tuple[str, Mapping[str, object], str]
"""Where a row stands, its columns, and what is wrong with it."""

_BLANK = re.compile(r"[ \t\r\n]*")


def is_array(head: bytes) -> bool:
    """Say whether a file that begins with ``head`` is a JSON array."""
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def line_rows(path: Path) -> Iterator[Parsed]:
    """Yield the rows of a JSON Lines file (UTF-8, with or without a BOM); no blank lines."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"line {number} of {path}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r\n")
            except UnicodeDecodeError as error:
                yield (
                    where,
                    {},
                    f"{where} must be UTF-8 text, got the byte 0x{line[error.start]:02x}; save "
                    "the file as JSON Lines in UTF-8",
                )
                continue
            if not text:
                continue
            repeated: list[str] = []
            try:
                row = _decoder(repeated).decode(text)
            except (ValueError, RecursionError) as error:
                yield (
                    where,
                    {},
                    f"{where} must be one JSON object, got {shorten(text)} ({error}); write every "
                    "example on a line of its own, or all in a list: [{...}, {...}]",
                )
                continue
            yield _row(row, repeated, where=where, text=text)


def array_rows(text: str, path: Path) -> Iterator[Parsed]:
    """Yield the rows of a JSON array of objects.

    Raises:
        ValueError: What follows a fault cannot be told.
    """
    position, line, number = text.index("[") + 1, 1, 0
    counted = 0

    def skip(start: int) -> int:
        found = _BLANK.match(text, start)
        return found.end() if found else start

    position = skip(position)
    is_empty = text[position : position + 1] == "]"
    while not is_empty:
        number += 1
        line += text.count("\n", counted, position)
        counted = position
        where = f"row {number} (line {line}) of {path}"
        repeated: list[str] = []
        try:
            if text[position : position + 1] == "]":
                raise ValueError("a comma stands before the closing bracket")
            row, end = _decoder(repeated).raw_decode(text, position)
            after = skip(end)
            if text[after : after + 1] not in (",", "]"):
                raise ValueError("neither a comma nor the closing bracket follows it")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where} must be a JSON object in a whole array, got "
                f"{shorten(text[position : position + 80])} ({error}); repair the file"
            ) from error
        yield _row(row, repeated, where=where, text=text[position:end])
        if text[after] == "]":
            position = after
            break
        position = skip(after + 1)
    rest = text[position + 1 :].strip()
    if rest:
        raise ValueError(
            f"{path} must end with its array, got {shorten(rest)} after it; write one array, or "
            "one object a line"
        )


def _decoder(repeated: list[str]) -> json.JSONDecoder:
    """Return a decoder that keeps the text of numbers, and writes down names given twice."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            times = Counter(name for name, _ in items)
            repeated.extend(name for name in found if times[name] > 1)
        return found

    return json.JSONDecoder(object_pairs_hook=pairs, parse_float=str, parse_int=str)


def _row(row: object, repeated: list[str], *, where: str, text: str) -> Parsed:
    if not isinstance(row, dict):
        return (
            where,
            {},
            f"{where} must be one JSON object, got {shorten(text)}; "
            'write {"instruction": ..., "response": ...}',
        )
    if repeated:
        return (
            where,
            {},
            f"{where} must name every column once, got {shorten(repeated[0])} twice; remove one",
        )
    return where, row, ""
