"""Every terminal gets its text: of any encoding, of any width."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from orchard.cli.encodings import write_what_the_terminal_knows
from orchard.engine.progress import Bar

ROWS = [{"instruction": f"Repeat {i}", "response": "yes", "category": "Łódź…"} for i in range(20)]


def said_in(encoding: str, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a terminal of an encoding gets of a text."""
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    write_what_the_terminal_knows()
    print(text, end="")
    sys.stdout.flush()
    return buffer.getvalue().decode(encoding)


def test_a_terminal_gets_what_it_knows_and_something_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "1… ± 2 · Ł"
    assert said_in("utf-8", text, monkeypatch) == text
    assert said_in("latin-1", text, monkeypatch) == "1... ± 2 · \\u0141"
    assert said_in("ascii", text, monkeypatch) == "1... +- 2 - \\u0141"


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["latin-1", pytest.param("ascii", marks=pytest.mark.long)])
def test_a_command_shows_its_table_where_boxes_are_unknown(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    more = ["data.path=rows.jsonl", "data.partition=category", "model.path=x"]
    done = subprocess.run(
        [sys.executable, "-m", "orchard", "partition", "recipes/own/orchard.toml", *more],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": encoding, "COLUMNS": "60"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert "\\u0141" in text
    assert "18" in [cell.strip() for line in text.splitlines() for cell in line.split("|")]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_cuts_no_number(encoding: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    write_what_the_terminal_knows()
    bar = Bar(Console(file=sys.stdout, force_terminal=True, width=width, legacy_windows=False))
    bar.begin(title="flex+fedadam+fedprox", num_rounds=120, round_number=0)
    for number in range(1, 121):
        bar.completed(number, loss=2.345, uplink_bytes=1_234_567)
    bar.end()
    sys.stdout.flush()
    last = buffer.getvalue().decode(encoding).split("\r")[-1]
    for number in ("120/120", "2.345", "148.1 MB"):
        assert number in last
