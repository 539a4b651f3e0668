"""Tables on screens of any width: a number is shown whole, or further below, never cut."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

_PADDING, _FEWEST = 3, 8  # beside each column's text; of a column of names, before it folds
_LONGEST_WORD = 16  # of a header


def print_table(console: Console, table: Table, *, num_keys: int = 1) -> None:
    """Print a table, in several parts below each other where the console is too narrow for one.

    Args:
        console: Where to.
        table: Its first columns name the row, the others hold numbers.
        num_keys: How many name the row; they stand in every part, folded where they are long.
    """
    for part in parts_of(table, console, num_keys=num_keys):
        console.print(part)


def parts_of(table: Table, console: Console, *, num_keys: int = 1) -> Iterator[Table]:
    """Yield a table as it is where it fits, else as several that do."""
    natural = [_width(console, column, is_whole=True) for column in table.columns]
    if _total(natural) <= console.width:
        yield table
        return
    keys, numbers = table.columns[:num_keys], table.columns[num_keys:]
    widths = [_width(console, column) for column in numbers]
    # What is left beside the widest number, among the columns that name the row.
    left = console.width - 1 - max(widths, default=0) - _PADDING * (1 + num_keys)
    own = [min(width, max(_FEWEST, left // num_keys)) for width in natural[:num_keys]]
    title = table.title
    chosen: list[int] = []
    for index, width in enumerate(widths):
        taken = [*own, *(widths[i] for i in chosen), width]
        if chosen and _total(taken) > console.width:
            yield _part(table, keys, own, [(numbers[i], widths[i]) for i in chosen], title)
            chosen, title = [], None
        chosen.append(index)
    yield _part(table, keys, own, [(numbers[i], widths[i]) for i in chosen], title)


def _total(widths: list[int]) -> int:
    return sum(width + _PADDING for width in widths) + 1


def _width(console: Console, column: Column, *, is_whole: bool = False) -> int:
    """Return what a column needs: its cells whole, and of its header the longest word."""
    cells = [Measurement.get(console, console.options, cell).maximum for cell in column.cells]
    header = Measurement.get(console, console.options, column.header)
    return max([header.maximum if is_whole else min(header.minimum, _LONGEST_WORD), *cells])


def _part(
    table: Table,
    keys: list[Column],
    key_widths: list[int],
    numbers: list[tuple[Column, int]],
    title: object,
) -> Table:
    part = Table(title=title, title_justify=table.title_justify)  # type: ignore[arg-type]
    for column, width in [*zip(keys, key_widths, strict=True), *numbers]:
        part.add_column(column.header, justify=column.justify, width=width, overflow="fold")
    columns = [*keys, *(column for column, _ in numbers)]
    lines = zip(*(column.cells for column in columns), strict=True)
    for row, cells in zip(table.rows, lines, strict=True):
        part.add_row(*cells, style=row.style, end_section=row.end_section)
    return part
