"""No screen is too narrow for a number."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from orchard.tables import parts_of, print_table

NUMBERS = [f"{10**place + 1:,}" for place in range(9)]


def example(num_rows: int = 3, *, names: int = 20) -> Table:
    table = Table("client", "model", title="what each client needs", title_justify="left")
    for index in range(len(NUMBERS)):
        table.add_column(f"predicted peak {index}", justify="right")
    for row in range(num_rows):
        table.add_row(f"client {row} " + "x" * names, "global", *NUMBERS)
    return table


def shown(table: Table, width: int, *, num_keys: int = 2) -> str:
    file = io.StringIO()
    print_table(Console(file=file, width=width), table, num_keys=num_keys)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 250])
def test_every_number_is_whole_in_every_row_at_every_width(width: int) -> None:
    text = shown(example(), width)
    cells = [cell.strip() for line in text.splitlines() for cell in line.split("│")]
    for number in NUMBERS:
        assert cells.count(number) == 3
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("what each client needs") == 1


@pytest.mark.parametrize("width", [40, 60])
def test_what_names_a_row_is_in_every_part_and_whole(width: int) -> None:
    text = shown(example(1), width)
    parts = [part for part in text.split("└") if "│" in part]
    assert len(parts) > 1
    for part in parts:
        lines = [line.split("│")[1].strip() for line in part.splitlines() if "│" in line]
        assert "client0" + "x" * 20 in "".join(lines).replace(" ", "")


def test_a_table_that_fits_is_the_table_itself() -> None:
    table = example()
    assert list(parts_of(table, Console(width=300), num_keys=2)) == [table]


def test_a_header_of_one_long_word_folds_and_its_number_does_not() -> None:
    table = Table("model")
    for client in ("a" * 50, "b" * 50):
        table.add_column(client, justify="right")
    table.add_row("global", "[bold]12.3 ± 0.4[/bold]", "45.6 ± 0.7", end_section=True)
    text = shown(table, 40, num_keys=1)
    assert "12.3 ± 0.4" in text
    assert "45.6 ± 0.7" in text
    heads = [line.split("┃")[2].strip() for line in text.splitlines() if "┃" in line]
    assert "".join(heads) == "a" * 50 + "b" * 50
