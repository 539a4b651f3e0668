"""What is in a file is what is read, character for character, whatever kind of file it is."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.data.datasets import read_file, read_folder
from orchard.data.examples import Example
from orchard.data.reading import Reader
from orchard.data.rows import read_rows

CELLS = (
    *("00001", "2000", "2000.0", "007", "1.50", "1e5", "1E+5", "-0", "9" * 30, "0x1F", "1_000"),
    *("None", "NA", "N/A", "null", "nan", "NaN", "true", "False", "inf", "-"),
    *("2024-05-01", "01/05/2024", "12:30", "+441632960001", "50%", "=1+1", " a ", "a,b", 'a "b"'),
    *("one\ntwo", "one\r\ntwo", "one\rtwo", "a\u2028b", "tab\there", "é", "e\u0301", "#", ";"),
)


def as_csv(path: Path, cells: tuple[str, ...]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["instruction", "response", "category"])
        writer.writerows([f"q{n}", cell, cell] for n, cell in enumerate(cells))


def as_rows(cells: tuple[str, ...]) -> list[dict[str, str]]:
    return [
        {"instruction": f"q{n}", "response": cell, "category": cell} for n, cell in enumerate(cells)
    ]


def as_array(path: Path, cells: tuple[str, ...]) -> None:
    path.write_text(json.dumps(as_rows(cells), indent=1), encoding="utf-8")


def as_lines(path: Path, cells: tuple[str, ...]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in as_rows(cells)), encoding="utf-8")


def as_parquet(path: Path, cells: tuple[str, ...]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(as_rows(cells)), path)


KINDS: dict[str, Callable[[Path, tuple[str, ...]], None]] = {
    "a.csv": as_csv,
    "b.tsv": as_csv,
    "c.json": as_array,
    "d.jsonl": as_lines,
    "e.txt": as_lines,
    "f.ndjson": as_lines,
    "g.parquet": as_parquet,
    "h.CSV": as_csv,
}


@pytest.mark.parametrize(("name", "write"), KINDS.items(), ids=KINDS.keys())
def test_every_kind_of_file_is_read_character_for_character(
    tmp_path: Path, name: str, write: Callable[[Path, tuple[str, ...]], None]
) -> None:
    write(tmp_path / name, CELLS)
    assert read_file(tmp_path / name, Reader()).examples == [
        Example(f"q{n}", cell, category=cell) for n, cell in enumerate(CELLS)
    ]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0")).filter(str.strip), min_size=1
    )
)
def test_any_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    as_csv(path, tuple(texts))
    assert [example.response for example in read_file(path, Reader()).examples] == texts


@pytest.mark.parametrize("number", ["2000.0", "2000", "1e5", "1E+05", "0.10", "-0", "9" * 5000])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_number_is_its_text_in_the_file(tmp_path: Path, suffix: str, number: str) -> None:
    row = f'{{"instruction": "a", "response": {number}, "category": {number}}}'
    (tmp_path / f"a.{suffix}").write_text(f"[{row}]" if suffix == "json" else f"{row}\n")
    (example,) = read_file(tmp_path / f"a.{suffix}", Reader()).examples
    assert (example.response, example.category) == (number, number)


def test_numbers_of_a_table_have_no_digits_that_nobody_wrote(tmp_path: Path) -> None:
    from datetime import date
    from decimal import Decimal

    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "whole": pa.array([2**60 + 1]),
        "narrow": pa.array([0.1], pa.float32()),
        "wide": pa.array([0.1]),
        "price": pa.array([Decimal("1.50")]),
        "day": pa.array([date(2024, 5, 1)]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    assert {name: str(value) for name, value in row.columns.items()} == {
        **{"whole": str(2**60 + 1), "narrow": "0.1", "wide": "0.1"},
        **{"price": "1.50", "day": "2024-05-01"},
    }


def test_class_labels_of_a_parquet_file_are_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        instruction=datasets.Value("string"),
        response=datasets.Value("string"),
        category=datasets.ClassLabel(names=["art", "law"]),
    )
    rows = {"instruction": ["q", "r"], "response": ["a", "b"], "category": [1, -1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    found = read_file(tmp_path / "a.parquet", Reader()).examples
    assert [example.category for example in found] == ["law", ""]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffinstruction;response\nWhat, then?;This\n",
        "instruction|response\nWhat, then?|This\n",
        'instruction;response;"notes, more"\nWhat, then?;This;\n',
        "sep=;\r\ninstruction;response\r\nWhat, then?;This\r\n",
        '\ufeffsep=,\ninstruction,response\n"What, then?",This\n',
    ],
)
def test_a_header_says_what_stands_between_cells(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text, "utf-8", newline="")
    assert read_file(tmp_path / "a.csv", Reader()).examples == [Example("What, then?", "This")]


def test_a_column_of_row_numbers_without_a_name_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",instruction,response\n0,a,b\n")
    reading = read_file(tmp_path / "a.csv", Reader())
    assert reading.examples == [Example("a", "b")]
    assert reading.unread == {"(column 1)": 1}


def test_reading_a_long_cell_leaves_the_limit_of_others_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"instruction,response\na,{'b' * 2 * before}\n")
    assert len(read_file(tmp_path / "a.csv", Reader()).examples[0].response) == 2 * before
    assert csv.field_size_limit() == before


GOOD = '{"instruction": "a", "response": "b"}'
WRONG = {
    "a.csv": (b"\xff\xfei\0n\0", "must be UTF-8 text, got UTF-16; save it in UTF-8"),
    "b.jsonl": ('{"instruction"'.encode("utf-16-le"), "must be UTF-8 text, got a NUL byte at 1"),
    "c.csv": (b"instruction,response\nd\xe9j\xe0,b\n", r"line 2 of .* got the byte 0xe9"),
    "d.json": (f"[{GOOD},\n]".encode(), r"row 2 \(line 2\) .*a comma stands before the closing"),
    "e.json": (f"[{GOOD}".encode(), r"row 1 \(line 1\) .*neither a comma nor the closing"),
    "f.json": (f"[{GOOD}]\n{GOOD}".encode(), "must end with its array, got"),
    "g.json": (f"[{GOOD},\n 3]".encode(), r"row 2 \(line 2\) of .* must be one JSON object, got"),
    "h.json": (b'{"data": [{"instruction": "a"}]}', "must be a list of rows, got .*'data'"),
    "i.json": (b'{\n"instruction": "a"}', r"line 1 of .* must be one JSON object.*all in a list"),
    "j.csv": (b"instruction,response\na,b,c\n", "line 2 of .* must have 2 cells .* got 3"),
    "k.csv": (b"instruction,response\na\n", "line 2 of .* must have 2 cells .* got 1"),
    "l.csv": (b"instruction,response,response\n", "must name every column once, got 'response'"),
    "m.csv": (b"what,that\n1,2\n", "must have the columns of a known format"),
    "n.csv": (b'instruction,response\n"a,b\nc,d\n', "line 2 of .* close every quote"),
    "o.csv": (b"instruction,response\n" + b"a,b\n" * 2000 + b"a,\0\n", "line 2002 .* a NUL byte"),
    "p.jsonl": (b'{"instruction": "a", "response": "b", "response": "c"}', "'response' twice"),
    "q.parquet": (b"PAR1 and no more", "must be a whole parquet file, got an error"),
    "r.parquet": (b"text", "must be a parquet file, got something else"),
    "s.csv": (b"PK\x03\x04", "got a zip archive or a spreadsheet; unpack it, or save the sheet"),
    "t.json": (b"\x1f\x8b\x08", "got a gzip archive; unpack it"),
    "u.jsonl": (b'{"instruction": "a", "response": {"b": 1, "b": 2}}', "'b' twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_line_that_says_where_and_what_to_do(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_file(tmp_path / name, Reader())
    assert name in str(caught.value)
    assert "; " in str(caught.value), "the message must say what to do"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_file_of_any_kind_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=f"{name} must have at least one example, got none"):
        read_file(tmp_path / name, Reader())


def test_an_empty_list_has_no_example(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(" [ ]\n")
    with pytest.raises(ValueError, match="must have at least one example, got none"):
        read_file(tmp_path / "a.json", Reader())


# Bad rows

BAD_ROWS = {
    "jsonl": f"{GOOD}\nnot json\n{GOOD}\n[1]\n" + '{"instruction": "a", "response": " "}\n',
    "json": f'[{GOOD}, 3,\n{GOOD}, {{"instruction": "a"}}, {{"instruction": "", "response": "b"}}]',
    "csv": "instruction,response\na,b\na\na,b\na,b,c\na,\n",
}


@pytest.mark.parametrize("suffix", BAD_ROWS)
def test_bad_rows_are_an_error_or_left_out_and_counted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(BAD_ROWS[suffix])
    with pytest.raises(ValueError, match=r"(line 2|row 2|line 3)"):
        read_file(path, Reader())
    reading = read_file(path, Reader(bad_rows="skip"))
    assert reading.examples == [Example("a", "b")] * 2
    assert (reading.num_rows, len(reading.bad)) == (5, 3)
    assert all(str(path) in error for error in reading.bad)


def test_a_file_of_bad_rows_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "response": ""}\n{"instruction": 1}\n')
    with pytest.raises(ValueError, match=r"at least one row that is an example, got 2 bad ones"):
        read_file(tmp_path / "a.jsonl", Reader(bad_rows="skip"))


# Folders of clients


def test_files_of_any_kind_are_clients(tmp_path: Path) -> None:
    for name, write in KINDS.items():
        write(tmp_path / name, CELLS)
    read = read_folder(tmp_path, Reader())
    assert list(read.clients) == ["a", "b", "c", "d", "f", "g", "h"]
    wanted = read.clients["a"].examples
    assert all(reading.examples == wanted for reading in read.clients.values())
    assert read.unread == ("e.txt",)


def test_two_files_of_one_client_are_refused_by_name(tmp_path: Path) -> None:
    as_csv(tmp_path / "ward.csv", CELLS)
    as_lines(tmp_path / "ward.jsonl", CELLS)
    with pytest.raises(ValueError, match=r"got 'ward\.csv' and 'ward\.jsonl' for 'ward'; rename"):
        read_folder(tmp_path, Reader())


def test_a_folder_in_the_form_of_the_hub_keeps_its_cells_too(tmp_path: Path) -> None:
    from orchard.data.datasets import read_dataset

    as_csv(tmp_path / "train.csv", CELLS)
    as_csv(tmp_path / "test.csv", CELLS[:2])
    reading = read_dataset(str(tmp_path), Reader())
    assert [example.response for example in reading.examples] == list(CELLS)
    assert reading.splits == ("test",)
    sliced = read_dataset(str(tmp_path), Reader(), split="train[1:3]+test")
    assert [example.response for example in sliced.examples] == [*CELLS[1:3], *CELLS[:2]]
