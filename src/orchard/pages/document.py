"""One HTML file that needs nothing beside it: its frame, and what every page is made of.

Names of clients, reasons of refusals and metrics may come from other parties: as text in HTML they
are escaped, in the page's data they cannot close its element, and scripts set them as text. The
page may load nothing (its content security policy), so what it shows stays where it is opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from typing import Any

import vl_convert

from orchard.pages.drawing import VERSION, Chart

_FEW = 2  # notes that stand above everything else


@dataclass(frozen=True)
class Filter:
    """A choice that applies to all charts whose rows have the field.

    Attributes:
        field: Of the rows.
        values: That can be chosen.
        has_all: Whether all of them can be shown at once.
    """

    field: str
    values: Sequence[str]
    has_all: bool = True


def document(
    *,
    title: str,
    notes: Sequence[str],
    filters: Sequence[Filter],
    charts: Sequence[Chart],
    parts: Sequence[str],
) -> str:
    """Return a page as text.

    Args:
        title: Of the page.
        notes: What stands above everything else; many of them behind their number.
        filters: Above the charts.
        charts: That ``parts`` has a section for.
        parts: Sections in HTML, in order.
    """
    content = {
        "charts": [
            {
                "name": chart.name,
                "title": chart.title,
                "about": chart.about,
                "spec": chart.spec,
                "rows": chart.rows,
                "columns": chart.columns,
                "bands": chart.bands,
            }
            for chart in charts
        ]
    }
    scripts = [_drawing_library(), _resource("page.js")]
    selects = "".join(map(_select, filters))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{_resource('page.css')}</style></head><body>",
            '<a class="skip" href="#charts">Skip to the charts</a>',
            f"<header><h1>{escape(title)}</h1>",
            _in_short(notes),
            "</header>",
            f'<form class="filters" aria-label="What the charts show">{selects}</form>',
            '<main id="charts">',
            *parts,
            "</main>",
            f'<script type="application/json" id="page-data">{_as_data(content)}</script>',
            *(f'<script type="module">{script}</script>' for script in scripts),
            "</body></html>",
            "",
        ]
    )


def _in_short(notes: Sequence[str]) -> str:
    """Return a few notes as they are, more of them behind their number."""
    text = "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes)
    if len(notes) <= _FEW:
        return text
    return f"<details><summary>{len(notes)} notes</summary>{text}</details>"


def _select(choice: Filter) -> str:
    options = ['<option value="">all</option>'] if choice.has_all else []
    options += [f'<option value="{escape(v)}">{escape(v)}</option>' for v in choice.values]
    name = escape(choice.field)
    return f'<label>{name}<select data-filter="{name}">{"".join(options)}</select></label>'


def chart_section(chart: Chart, *, is_wide: bool) -> str:
    """Return where a chart is drawn, and its numbers as a table below it."""
    wide = ' class="wide"' if is_wide else ""
    return (
        f'<section{wide} id="{chart.name}"><h2>{escape(chart.title)}</h2>'
        f'<p class="quiet">{escape(chart.about)}</p>'
        f'<div class="chart" id="chart-{chart.name}"></div>'
        f'<details id="table-{chart.name}"><summary>The numbers</summary>'
        '<div class="scroll"></div></details></section>'
    )


def table_section(name: str, title: str, about: str, table: str) -> str:
    """Return a table of the page's whole width."""
    said = f'<p class="quiet">{escape(about)}</p>' if about else ""
    return f'<section class="wide" id="{name}"><h2>{escape(title)}</h2>{said}{table}</section>'


def facts_section(title: str, facts: Mapping[str, Any]) -> str:
    """Return facts and their names, without those that are not known."""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"<section><h2>{escape(title)}</h2><dl>{items}</dl></section>"


def text_cell(value: Any) -> str:
    """Return a cell of text."""
    return f"<td>{escape(str(value))}</td>"


def number_cell(value: float | None, text: str) -> str:
    """Return a cell of a number as people read it, which also has it whole."""
    if value is None:
        return "<td></td>"
    return f'<td class="number" data-value="{value!r}">{escape(text)}</td>'


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table; ``rows`` are their cells in HTML."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _as_data(content: Any) -> str:
    """Return JSON that cannot end the element that it stands in."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _policy(scripts: Sequence[str]) -> str:
    """Allow these scripts and nothing from elsewhere; Vega makes functions of its expressions."""
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; "
        "style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"
    )


@cache
def _drawing_library() -> str:
    """Return what draws the charts, as one script; making it takes a second."""
    version = ".".join(VERSION.split(".")[:2])
    bundle: str = vl_convert.javascript_bundle(
        "globalThis.vegaEmbed = vegaEmbed;", vl_version=version
    )
    return bundle


def _resource(name: str) -> str:
    return resources.files("orchard.pages").joinpath(name).read_text(encoding="utf-8")
