"""The rows of one source become examples, and a record of what was not read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from orchard.data.conversations import unread_keys
from orchard.data.examples import Example, Fields
from orchard.data.formats import Format, Layout, choose_layout, probably
from orchard.data.rows import Row

BadRows: TypeAlias = Literal["error", "skip"]

# By so many rows a format is recognized; what comes after them is read one by one.
_NUM_LOOKED_AT = 1000
# How many bad rows, columns and files a note names.
_NUM_NAMED = 3
_NUM_FILES = 5
_NUM_COLUMNS = 12


@dataclass(frozen=True)
class Reader:
    """How sources are read.

    Attributes:
        fields: Which column holds what.
        format: What the rows are; ``auto`` = recognized by their columns.
        bad_rows: Whether a row that is no example is an error, or is left out and counted.
    """

    fields: Fields = field(default_factory=Fields)
    format: Format = "auto"
    bad_rows: BadRows = "error"


@dataclass(frozen=True)
class Reading:
    """What was read of one source.

    Attributes:
        examples: In their order.
        num_rows: Rows there are, good and bad.
        taken: What ``auto`` took that the recipe does not name, in words; "" = nothing.
        unread: Column that was not read to the number of rows in which it holds something.
        hints: Column that was not read to what it probably is.
        bad: What is wrong with the rows that were left out.
        splits: Other splits that the source has, which were not read.
        files: Files beside those of the source, which were not read.
    """

    examples: list[Example]
    num_rows: int = 0
    taken: str = ""
    unread: Mapping[str, int] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


def read_source(rows: Iterable[Row], reader: Reader, *, where: str) -> Reading:
    """Read the rows of one source.

    Args:
        rows: Good ones and bad ones.
        reader: How.
        where: The source, for messages.

    Returns:
        What was read; no example where there is no row.

    Raises:
        ValueError: A row is no example, and bad rows are errors; all rows are bad; or the rows are
            of no known format.
    """
    following = iter(rows)
    first = list(itertools.islice(following, _NUM_LOOKED_AT))
    if reader.bad_rows == "error":
        for row in first:
            if row.error:
                raise ValueError(row.error)
    layout = choose_layout(
        [row.columns for row in first if not row.error],
        fields=reader.fields,
        format=reader.format,
        where=where,
    )
    examples: list[Example] = []
    unread: Counter[str] = Counter()
    columns: dict[str, None] = {}
    bad: list[str] = []
    num_rows = 0
    for row in _released(first, following):
        num_rows += 1
        try:
            if row.error:
                raise ValueError(row.error)
            examples.append(layout.example(row.columns, where=row.where))
        except ValueError as error:
            if reader.bad_rows == "error":
                raise
            bad.append(str(error))
            continue
        columns.update(dict.fromkeys(row.columns))
        unread.update(_unread(row.columns, layout))
    if bad and not examples:
        raise ValueError(
            f"{where} must have at least one row that is an example, got {num_rows} bad ones, the "
            f"first: {bad[0]}"
        )
    return Reading(
        examples=examples,
        num_rows=num_rows,
        taken=layout.taken(reader.fields, list(columns)) if reader.format == "auto" else "",
        unread=unread,
        hints={column: hint for column in unread if (hint := probably(column, layout))},
        bad=tuple(bad),
    )


def reading_notes(readings: Mapping[str, Reading], *, of: str) -> list[str]:
    """Return what was taken, left out or not read, each said once for all sources.

    Args:
        readings: Source, such as a client, to what was read of it.
        of: The option that names the data.
    """
    notes = []
    by_format: dict[str, list[str]] = {}
    for source, reading in readings.items():
        by_format.setdefault(reading.taken, []).append(source)
    for taken, sources in by_format.items():
        whose = f" of {_listed(list(map(repr, sources)))}" if len(by_format) > 1 else ""
        if taken:
            notes.append(f"{of}{whose} is read as {taken}; data.format says it otherwise")
    unread: Counter[str] = Counter()
    hints: dict[str, str] = {}
    for reading in readings.values():
        unread.update(reading.unread)
        hints |= reading.hints
    if unread:
        named = [
            f"{column!r} ({_rows(number)}{'; probably ' if column in hints else ''}"
            f"{hints.get(column, '')})"
            for column, number in unread.items()
        ]
        notes.append(f"columns of {of} that are not read: {_listed(named, most=_NUM_COLUMNS)}")
    splits = list(dict.fromkeys(name for reading in readings.values() for name in reading.splits))
    if splits:
        others = _listed(list(map(repr, splits)), most=_NUM_COLUMNS)
        notes.append(
            f"splits of {of} that are not read: {others}; data.split names the one that is"
        )
    notes += unread_files([name for reading in readings.values() for name in reading.files], of=of)
    bad = [error for reading in readings.values() for error in reading.bad]
    if bad:
        total = sum(reading.num_rows for reading in readings.values())
        notes.append(
            f"{len(bad)} of {_rows(total)} of {of} are bad and left out: {_listed(bad, mark='; ')}"
        )
    return notes


def unread_files(names: Sequence[str], *, of: str) -> list[str]:
    """Return the note that names files which are not read; none where there is no such file."""
    if not names:
        return []
    listed = _listed(list(map(repr, names)), most=_NUM_FILES, mark=", ")
    return [f"files of {of} that are not read ({len(names)}): {listed}"]


def _released(first: list[Row], following: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows that were looked at, and then the others; none is kept."""
    first.reverse()
    while first:
        yield first.pop()
    yield from following


def _unread(columns: Mapping[str, object], layout: Layout) -> Iterator[str]:
    known = layout.fields.read
    for column, value in columns.items():
        if column not in known:
            if value is not None and value not in ("", []):
                yield column
        elif column == layout.fields.conversation:
            for key in sorted(unread_keys(value)):
                yield f"{column}[].{key}"


def _listed(names: Sequence[str], *, most: int = _NUM_NAMED, mark: str = ", ") -> str:
    more = len(names) - most
    return mark.join(names[:most]) + (f"{mark}and {more} more" if more > 0 else "")


def _rows(number: int) -> str:
    return f"{number} row" if number == 1 else f"{number} rows"
