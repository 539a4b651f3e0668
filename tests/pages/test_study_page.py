"""The page about a study says what its record says, and shows names as text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from browsers import opened_page
from made_runs import write_run
from made_studies import CELLS, METHODS, METRICS, write_study
from orchard.cli import app
from orchard.pages.writing import write_page


class Numbers(HTMLParser):
    """The whole numbers behind a page's cells, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.values: list[float] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if (value := dict(attrs).get("data-value")) is not None:
            self.values.append(float(value))


def test_the_table_holds_every_row_of_the_record(tmp_path: Path) -> None:
    rows = write_study(tmp_path / "study")
    write_page([tmp_path / "study"], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    numbers = Numbers(text)
    keys = (
        *("private", "shared", "uplink_bytes", "downlink_bytes", "steps", "seconds"),
        *("search_seconds", "row_seconds"),
    )
    speeds = [1.0] * 2 * len(CELLS) * len(METRICS)  # of those that reached the level
    assert numbers.values == speeds + [
        value
        for row in rows
        for value in (
            *(row["mean"], row["spread"], row["worst"]),
            *([row["difference"]["mean"]] if row["difference"] else []),
            *(row[key] for key in keys),
        )
    ]
    assert "img" not in numbers.tags
    assert text.count("<td>never</td>") == len(CELLS) * len(METRICS)
    assert "2 of 20 runs are not there yet" in text
    assert text.count("chosen</td>") == len(METHODS) * len(CELLS)


def test_charts_hold_the_intervals_and_every_client(tmp_path: Path) -> None:
    rows = write_study(tmp_path / "study")
    write_page([tmp_path / "study"], tmp_path / "page.html")
    charts = {chart["name"]: chart["rows"] for chart in _data(tmp_path / "page.html")["charts"]}
    assert [(row["low"], row["high"], row["seen"]) for row in charts["differences"]] == [
        (row["difference"]["low"], row["difference"]["high"], row["verdict"])
        for row in rows
        if row["difference"]
    ]
    clients = [row["value"] for row in charts["values"] if row["kind"] == "client"]
    assert clients == [value for row in rows for value in row["clients"].values()]
    assert [row["megabytes"] for row in charts["costs"]] == [0.08] * len(rows)
    assert [row["value"] for row in charts["learning"]] == [3.5, 3.0, 3.5, 3.125, 3.5, 3.25] * (
        len(CELLS) * len(METRICS)
    )


def test_a_record_from_before_a_column_still_makes_a_page(tmp_path: Path) -> None:
    write_study(tmp_path / "study")
    path = tmp_path / "study" / "study.json"
    record = json.loads(path.read_text())
    del record["curves"]
    for row in record["rows"]:
        del row["search_seconds"], row["row_seconds"]
    path.write_text(json.dumps(record))
    write_page([tmp_path / "study"], tmp_path / "page.html")
    names = [chart["name"] for chart in _data(tmp_path / "page.html")["charts"]]
    assert names == ["differences", "values", "costs"]


def _data(page: Path) -> Any:
    pattern = r'<script type="application/json" id="page-data">(.*?)</script>'
    found = re.search(pattern, page.read_text(), re.S)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize(
    ("record", "folders", "words"),
    [
        ("", ["study", "run"], "a study must have a page of its own, got study beside"),
        ("{", ["study"], "study.json must be a study's record, got JSONDecodeError"),
        ("{}", ["study"], "study.json must be a study's record, got KeyError"),
        ('{"rows": []}', ["study"], "must hold a run, got none yet"),
    ],
)
def test_what_is_no_whole_study_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str, folders: list[str], words: str
) -> None:
    write_run(tmp_path / "run")
    write_study(tmp_path / "study")
    if record:
        (tmp_path / "study" / "study.json").write_text(record)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", *folders, "--html", "page.html"])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.long
def test_a_browser_draws_a_study(tmp_path: Path) -> None:
    write_study(tmp_path / "study")
    write_page([tmp_path / "study"], tmp_path / "page.html")
    for width in (400, 1600):
        with opened_page(tmp_path / "page.html", width=width) as opened:
            for name in ("differences", "values", "costs"):
                box = opened.locator(f"#chart-{name} svg").bounding_box()
                assert box is not None, name
                assert box["width"] > 100, name
                assert box["height"] > 60, name
            assert opened.evaluate("document.documentElement.scrollWidth") <= width
            points = opened.locator("#chart-differences svg .mark-symbol.role-mark path")
            assert points.count() == len(CELLS) * (len(METHODS) - 1)
            opened.locator("select[data-filter=grid]").select_option(CELLS[0])
            opened.wait_for_selector("html[data-drawn='2']")
            assert points.count() == len(METHODS) - 1
            opened.locator("select[data-filter=metric]").select_option(METRICS[1])
            opened.wait_for_selector("html[data-drawn='3']")
            axis = opened.locator("#chart-values svg .role-axis-label text")
            assert any("%" in text for text in axis.all_text_contents())
