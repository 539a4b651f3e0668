"""Charts and tables as one HTML file that needs nothing beside it.

Names of clients, reasons of refusals and metrics may come from other parties: as text in HTML they
are escaped, in the page's data they cannot close its element, and scripts set them as text. The
page may load nothing (its content security policy), so what it shows stays where it is opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import vl_convert

from orchard.pages import gathering
from orchard.pages.charts import VERSION, Chart, make_charts
from orchard.pages.gathering import Gathered, Row, gather
from orchard.reports import format_score
from orchard.results import write_atomically

_WIDE = ("quality", "curves", "events")
_FEW = 2  # notes that stand above everything else


def write_page(folders: Sequence[str | Path], path: Path) -> None:
    """Write a page about one or several runs.

    Args:
        folders: Of finished runs.
        path: Of the HTML file, which is replaced.

    Raises:
        FileNotFoundError: A run has no result (yet).
        ValueError: A result does not parse, or a run is named twice.
    """
    write_atomically(path, page_of(gather(folders)).encode())


def page_of(gathered: Gathered) -> str:
    """Return the page as text."""
    charts = make_charts(gathered)
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
    scripts = [
        vl_convert.javascript_bundle(
            "globalThis.vegaEmbed = vegaEmbed;", vl_version=".".join(VERSION.split(".")[:2])
        ),
        _resource("page.js"),
    ]
    title = ", ".join(run.name for run in gathered.runs)
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
            _in_short(_notes(gathered)),
            "</header>",
            _filters(gathered, charts),
            '<main id="charts">',
            _summary(gathered),
            *map(_section, charts),
            _clients(gathering.client_rows(gathered.runs)),
            *map(_facts, gathered.runs),
            "</main>",
            f'<script type="application/json" id="page-data">{_as_data(content)}</script>',
            *(f'<script type="module">{script}</script>' for script in scripts),
            "</body></html>",
            "",
        ]
    )


def _notes(gathered: Gathered) -> list[str]:
    comparison = gathered.comparison
    differing = f"The runs differ in {', '.join(comparison.differing)}."
    return [
        *([differing] if comparison.differing else []),
        *(f"Note: {note}." for note in (*comparison.incomparable, *comparison.notes)),
        *(
            f"Note on {run.name}: {note}."
            for run in gathered.runs
            for note in run.result.get("notes", ())
        ),
    ]


def _in_short(notes: Sequence[str]) -> str:
    """Return a few notes as they are, more of them behind their number."""
    text = "".join(f'<p class="quiet">{escape(note)}</p>' for note in notes)
    if len(notes) <= _FEW:
        return text
    return f"<details><summary>{len(notes)} notes</summary>{text}</details>"


def _filters(gathered: Gathered, charts: Sequence[Chart]) -> str:
    """Return the choices that apply to all charts: a metric always, the others with 'all'."""
    metrics = dict.fromkeys(
        row["metric"] for chart in charts for row in chart.rows if "metric" in row
    )
    clients = dict.fromkeys(client for run in gathered.runs for client in run.result["clients"])
    selects = [_select("metric", list(metrics), has_all=False)]
    if len(gathered.runs) > 1:
        selects.append(_select("run", [run.name for run in gathered.runs]))
    selects.append(_select("client", list(clients)))
    return f'<form class="filters" aria-label="What the charts show">{"".join(selects)}</form>'


def _select(name: str, values: Sequence[str], *, has_all: bool = True) -> str:
    options = ['<option value="">all</option>'] if has_all else []
    options += [f'<option value="{escape(v)}">{escape(v)}</option>' for v in values]
    return f'<label>{name}<select data-filter="{name}">{"".join(options)}</select></label>'


def _summary(gathered: Gathered) -> str:
    """Return the numbers of the first chart, which can be read without a script."""
    rows = []
    for row in gathered.comparison.rows:
        for model, by_metric in row.metrics.items():
            for metric, estimate in by_metric.items():
                interval = (
                    ""
                    if estimate.low is None or estimate.high is None
                    else f"[{format_score(estimate.low, metric)}, "
                    f"{format_score(estimate.high, metric)}]"
                )
                rows.append(
                    [
                        f"<td>{escape(row.name)}</td><td>{escape(row.about)}</td>",
                        f"<td>{escape(model)}</td><td>{escape(metric)}</td>",
                        _number(estimate.mean, format_score(estimate.mean, metric)),
                        f'<td class="number">{interval}</td>',
                        _number(estimate.worst, format_score(estimate.worst, metric)),
                        _number(
                            row.uplink_bytes_per_round, f"{row.uplink_bytes_per_round or 0:,.0f}"
                        ),
                    ]
                )
    head = ("run", "method", "model", "metric", "mean", "95 %", "worst", "bytes sent per round")
    return (
        '<section class="wide" id="summary"><h2>Summary</h2>'
        '<p class="quiet">Mean over clients and the worst client, in percent but for losses.</p>'
        f"{_table(head, [''.join(cells) for cells in rows])}</section>"
    )


def _number(value: float | None, text: str) -> str:
    if value is None:
        return "<td></td>"
    return f'<td class="number" data-value="{value!r}">{escape(text)}</td>'


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _section(chart: Chart) -> str:
    wide = ' class="wide"' if chart.name in _WIDE else ""
    return (
        f'<section{wide} id="{chart.name}"><h2>{escape(chart.title)}</h2>'
        f'<p class="quiet">{escape(chart.about)}</p>'
        f'<div class="chart" id="chart-{chart.name}"></div>'
        f'<details id="table-{chart.name}"><summary>The numbers</summary>'
        '<div class="scroll"></div></details></section>'
    )


def _clients(rows: Sequence[Row]) -> str:
    head = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        "".join(
            f'<td class="number">{value:,.6g}</td>'
            if isinstance(value := row.get(key, ""), int | float)
            else f"<td>{escape(str(value or ''))}</td>"
            for key in head
        )
        for row in rows
    ]
    return f'<section class="wide" id="clients"><h2>Clients</h2>{_table(head, lines)}</section>'


def _facts(run: gathering.RunRecord) -> str:
    """Return what a run ran on and on what, by its digests."""
    result = run.result
    hardware = result.get("hardware") or {}
    versions = result.get("versions") or {}
    facts: dict[str, Any] = {
        "method": result["strategy"],
        "seed": result["seed"],
        "rounds": result["num_rounds"],
        "seconds": f"{result['seconds']['rounds']:.1f}",
        "peak memory": f"{result['peak_memory_bytes'] / 1e9:.2f} GB",
        "learning rate": result.get("learning_rate"),
        "commit": result.get("commit"),
        "recipe": result.get("recipe_digest"),
        "data": result.get("data_digest"),
        "base": result.get("base_digest"),
        "shared values": result.get("shared_digest"),
        "processor": hardware.get("cpu"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"<section><h2>{escape(run.name)}</h2><dl>{items}</dl></section>"


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


def _resource(name: str) -> str:
    return resources.files("orchard.pages").joinpath(name).read_text(encoding="utf-8")
