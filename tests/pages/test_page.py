"""The page as a text, and as people see it: in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from browsers import browser
from made_runs import CLIENTS, write_run
from orchard.cli import app
from orchard.pages.writing import write_page

WIDTHS = (400, 1000, 1600)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_run(folder / "run")
    result = CliRunner().invoke(
        app, ["report", str(folder / "run"), "--html", str(folder / "page.html")]
    )
    assert result.exit_code == 0, result.output
    return folder / "page.html"


class Elements(HTMLParser):
    """What a page holds, as a browser reads it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_name_from_elsewhere_is_text_and_nothing_is_loaded(page: Path) -> None:
    text = page.read_text()
    elements = Elements(text)
    assert not [tag for tag, _ in elements.found if tag in ("img", "iframe", "link", "object")]
    assert [tag for tag, own in elements.found if "src" in own or "onerror" in own] == []
    data = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.S)
    assert data is not None
    shown = json.loads(data[1])
    assert CLIENTS[2] in {row.get("client") for row in shown["charts"][0]["rows"]}
    (policy,) = [own["content"] for tag, own in elements.found if "http-equiv" in own]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


def test_the_summary_holds_the_numbers_of_the_result(page: Path) -> None:
    result = json.loads((page.parent / "run" / "result.json").read_text())
    expected = [
        value
        for by_metric in result["summary"].values()
        for summary in by_metric.values()
        for value in (summary["mean"], summary["worst"])
    ]
    cells = [
        float(own["data-value"] or 0)
        for _, own in Elements(page.read_text()).found
        if "data-value" in own
    ]
    uplink = sum(result["uplink_bytes_per_round"]) / result["num_rounds"]
    assert [value for value in cells if value != uplink] == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "Missing option '--html'"),
        (["nowhere", "--html", "page.html"], "error: run must be a folder with a result.json"),
        (["run", "run", "--html", "page.html"], "error: runs must be different folders"),
        (["run", "--html", "run"], "Is a directory"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_is_there_is_replaced_whole(page: Path, tmp_path: Path) -> None:
    old = tmp_path / "page.html"
    old.write_text("x" * 10**7)
    write_page([page.parent / "run"], old)
    assert old.read_text() == page.read_text()


@pytest.mark.long
def test_a_browser_draws_the_page_and_people_can_use_it(page: Path) -> None:
    said: list[str] = []
    asked: list[str] = []
    result = json.loads((page.parent / "run" / "result.json").read_text())
    with browser() as chromium:
        for width in WIDTHS:
            for scheme in ("light", "dark"):
                opened = chromium.new_page(
                    viewport={"width": width, "height": 900}, color_scheme=scheme
                )
                opened.on("console", lambda message: said.append(message.text))
                opened.on("pageerror", lambda error: said.append(str(error)))
                opened.on("request", lambda request: asked.append(request.url))
                opened.goto(page.as_uri())
                opened.wait_for_selector("html[data-drawn='1']")
                _everything_is_drawn(opened)
                _text_stands_out(opened)
                assert opened.evaluate("document.documentElement.scrollWidth") <= width
                opened.close()
        opened = chromium.new_page(viewport={"width": 1000, "height": 900})
        opened.on("console", lambda message: said.append(message.text))
        opened.goto(page.as_uri())
        opened.wait_for_selector("html[data-drawn='1']")
        _filters_work_by_keyboard(opened)
        _tooltips_say_the_value(opened, result)
        _numbers_are_those_of_the_result(opened, result)
    assert said == []
    assert set(asked) == {page.as_uri()}


def _everything_is_drawn(opened: Any) -> None:
    for name in ("quality", "curves", "cost", "grafts", "gates", "moved", "active", "phases"):
        box = opened.locator(f"#chart-{name} svg").bounding_box()
        assert box is not None, name
        assert box["width"] > 100, name
        assert box["height"] > 60, name
    assert opened.locator("#chart-grafts svg .mark-rect.role-mark path").count() == 2 * len(CLIENTS)
    assert opened.locator("#chart-events").count() == 0


def _text_stands_out(opened: Any) -> None:
    """WCAG 2.1 asks for a contrast of 4.5 between text and what is behind it."""
    colors = opened.evaluate(
        """() => ["--text", "--quiet", "--accent"].flatMap((name) =>
            ["--ground", "--raised"].map((behind) =>
                [name, behind].map((n) =>
                    getComputedStyle(document.documentElement).getPropertyValue(n).trim())))"""
    )
    for text, behind in colors:
        light, dark = sorted((_luminance(text), _luminance(behind)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, behind)


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _filters_work_by_keyboard(opened: Any) -> None:
    marks = opened.locator("#chart-grafts svg .mark-rect.role-mark path")
    opened.keyboard.press("Tab")  # to what skips the filters
    opened.keyboard.press("Tab")
    opened.keyboard.press("Tab")
    focused = opened.evaluate("document.activeElement.dataset.filter")
    assert focused == "client"
    opened.keyboard.press("ArrowDown")
    opened.wait_for_selector("html[data-drawn='2']")
    assert marks.count() == 2
    opened.keyboard.press("ArrowUp")
    opened.wait_for_selector("html[data-drawn='3']")
    assert marks.count() == 2 * len(CLIENTS)


def _tooltips_say_the_value(opened: Any, result: Any) -> None:
    cell = opened.locator("#chart-grafts svg .mark-rect.role-mark path").first
    cell.evaluate("element => element.scrollIntoView({block: 'center'})")
    cell.hover(position={"x": 6, "y": 6})  # beside the number
    tip = opened.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    said = tip.inner_text()
    assert CLIENTS[0] in said
    own = result["grafts"][CLIENTS[0]]["layers.0"]
    assert f"{100 * (1 - own['loss'] / own['loss_none']):.1f}%" in said


def _numbers_are_those_of_the_result(opened: Any, result: Any) -> None:
    opened.locator("#table-quality summary").click()
    table = opened.locator("#table-quality table")
    table.wait_for()
    head = [cell.inner_text() for cell in table.locator("th").all()]
    rows = [
        dict(zip(head, (cell.inner_text() for cell in row.locator("td").all()), strict=True))
        for row in table.locator("tbody tr").all()
    ]
    shown = {
        (row["model"], row["client"]): float(row["value"])
        for row in rows
        if row["kind"] == "client"
    }
    metric = rows[0]["metric"]
    assert shown == {
        (model, client): pytest.approx(value, rel=1e-5)
        for model, by_metric in result["metrics"].items()
        for client, value in by_metric[metric].items()
    }
