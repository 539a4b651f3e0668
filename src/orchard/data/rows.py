"""Files become rows: JSON Lines, a JSON array, CSV, TSV and parquet.

Text is what stands in the file, character for character: nothing is taken for a number, a date or a
missing value. A row that cannot be read is passed on with what is wrong with it, and whoever reads
decides; where nothing after the fault can be trusted, reading ends with an error.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from orchard.data.json_rows import array_rows, is_array, line_rows
from orchard.data.turns import shorten
from orchard.library_errors import first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""How the names of files end that are read as data."""

_PARQUET = b"PAR1"
# What a file begins with that is no text, and what to do about it.
_MARKS = {
    codecs.BOM_UTF32_LE: ("UTF-32", "save it in UTF-8"),
    codecs.BOM_UTF16_LE: ("UTF-16", "save it in UTF-8"),
    codecs.BOM_UTF16_BE: ("UTF-16", "save it in UTF-8"),
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("a zstandard archive", "unpack it"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save the sheet as CSV"),
}
_HEAD_BYTES = 4096
_SEPARATOR = re.compile(r"sep=([,;|\t])")


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        where: Where it stands, for messages.
        columns: Column to value; empty where ``error`` is set.
        error: What is wrong with it, in the form of a message; "" = nothing.
    """

    where: str
    columns: Mapping[str, object] = field(default_factory=dict)
    error: str = ""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, in order.

    The suffix says what is CSV (``.csv``, ``.tsv``), the content what is parquet and what a JSON
    array; all else is JSON Lines.

    Raises:
        ValueError: The file is no text, or what follows a fault in it cannot be told.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    suffix = path.suffix.lower()
    if head.startswith(_PARQUET):
        return _parquet_rows(path)
    if suffix == ".parquet":
        raise ValueError(
            f"{path} must be a parquet file, got {'nothing' if not head else 'something else'}; "
            "write it again, or give it the suffix of what it is"
        )
    _check_is_text(head, path)
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, "\t" if suffix == ".tsv" else "")
    if is_array(head):
        return (Row(*row) for row in array_rows(_text(path), path))
    return (Row(*row) for row in line_rows(path))


def _check_is_text(head: bytes, path: Path) -> None:
    for mark, (kind, remedy) in _MARKS.items():
        if head.startswith(mark):
            raise ValueError(f"{path} must be UTF-8 text, got {kind}; {remedy}")
    if b"\0" in head:
        raise ValueError(
            f"{path} must be UTF-8 text, got a NUL byte at {head.index(0)}; save it in UTF-8, or "
            "name a file of text"
        )


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} of {path} must be UTF-8 text, got the byte 0x{content[error.start]:02x}; "
            "save the file in UTF-8"
        ) from error


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    text = _text(path)
    delimiter = delimiter or _delimiter(text)
    before = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        start = 1
        try:
            for cells in reader:
                where, start = f"line {start} of {path}", reader.line_num + 1
                # A first line sep=; tells spreadsheets what stands between cells, and is no row.
                if not cells or (not header and _SEPARATOR.fullmatch(delimiter.join(cells))):
                    continue
                if not header:
                    header = _header(cells, where=where)
                    continue
                yield _csv_row(cells, header, where=where)
        except csv.Error as error:
            raise ValueError(
                f"line {start} of {path} must begin a row of CSV, got an error ({error}); close "
                'every quote, and double a quote inside quotes ("")'
            ) from error
    finally:
        csv.field_size_limit(before)


def _delimiter(text: str) -> str:
    """Return what stands between the cells of a table, as its first line says."""
    first = next(iter(text.lstrip("\r\n").splitlines()), "")
    if found := _SEPARATOR.fullmatch(first):
        return found[1]
    # One column is no example, so a header without a comma says it; inside quotes is no border.
    bare = re.sub(r'"[^"]*"', "", first)
    return next((mark for mark in (",", ";", "\t", "|") if mark in bare), ",")


def _header(cells: list[str], *, where: str) -> list[str]:
    # A table is often written with its row numbers, in a first column without a name.
    header = [name or f"(column {number})" for number, name in enumerate(cells, start=1)]
    repeated = [name for name, times in Counter(header).items() if times > 1]
    if repeated:
        raise ValueError(
            f"{where} must name every column once, got {shorten(repeated[0])} twice; rename one"
        )
    return header


def _csv_row(cells: list[str], header: list[str], *, where: str) -> Row:
    if len(cells) != len(header):
        return Row(
            where,
            error=f"{where} must have {len(header)} cells as the header has, got {len(cells)}; "
            "put quotes around a cell with commas in it, or remove the row",
        )
    if any("\0" in cell for cell in cells):
        return Row(where, error=f"{where} must be text, got a NUL byte; repair or remove the row")
    return Row(where, dict(zip(header, cells, strict=True)))


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            repeated = [name for name, times in Counter(schema.names).items() if times > 1]
            if repeated:
                raise ValueError(
                    f"{path} must name every column once, got {shorten(repeated[0])} twice; "
                    "rename one"
                )
            labels = _label_names(schema.metadata)
            narrow = {entry.name for entry in schema if entry.type in (pa.float16(), pa.float32())}
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    columns = {
                        name: _label(value, labels[name])
                        if name in labels
                        else _plain(value, is_narrow=name in narrow)
                        for name, value in record.items()
                    }
                    yield Row(f"row {number} of {path}", columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} must be a whole parquet file, got an error ({first_line(error)}); write it "
            "again"
        ) from error


def _label_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the names of classes that Hugging Face's library wrote beside a table's columns."""
    try:
        about: Any = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = about.get("info", {}).get("features", {})
        return {
            column: feature["names"]
            for column, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (ValueError, AttributeError, KeyError):
        return {}


def _label(value: object, names: list[str]) -> object:
    # -1 is the hub's mark for a row without a label.
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _plain(value: object, *, is_narrow: bool) -> object:
    """Return a value of a table as JSON would hold it."""
    if isinstance(value, float) and is_narrow:
        import numpy as np

        return str(np.float32(value))
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal) else value
