"""A page about runs, or about a study: what a folder holds, as sections of one document."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchard.pages import document, gathering
from orchard.pages.charts import make_charts
from orchard.pages.document import Filter, number_cell, text_cell
from orchard.pages.gathering import Gathered, Row, gather
from orchard.pages.study import is_study, page_of_study
from orchard.reports import format_score
from orchard.results import write_atomically

_WIDE = ("quality", "curves", "events")


def write_page(folders: Sequence[str | Path], path: Path) -> None:
    """Write a page about one or several runs, or about a study.

    Args:
        folders: Of finished runs, or that of one study.
        path: Of the HTML file, which is replaced.

    Raises:
        FileNotFoundError: A run has no result (yet).
        ValueError: A result does not parse, a run is named twice, or a study is not alone.
    """
    studies = [folder for folder in folders if is_study(folder)]
    if studies and len(folders) > 1:
        raise ValueError(
            f"a study must have a page of its own, got {studies[0]} beside other folders; name it "
            "alone"
        )
    page = page_of_study(studies[0]) if studies else page_of(gather(folders))
    write_atomically(path, page.encode())


def page_of(gathered: Gathered) -> str:
    """Return the page about runs as text."""
    charts = make_charts(gathered)
    metrics = dict.fromkeys(
        row["metric"] for chart in charts for row in chart.rows if "metric" in row
    )
    clients = dict.fromkeys(client for run in gathered.runs for client in run.result["clients"])
    names = [run.name for run in gathered.runs]
    return document.document(
        title=", ".join(names),
        notes=_notes(gathered),
        filters=[
            Filter("metric", list(metrics), has_all=False),
            *([Filter("run", names)] if len(names) > 1 else []),
            Filter("client", list(clients)),
        ],
        charts=charts,
        parts=[
            _summary(gathered),
            *(document.chart_section(chart, is_wide=chart.name in _WIDE) for chart in charts),
            _clients(gathering.client_rows(gathered.runs)),
            *map(_facts, gathered.runs),
        ],
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
                        *map(text_cell, (row.name, row.about, model, metric)),
                        number_cell(estimate.mean, format_score(estimate.mean, metric)),
                        f'<td class="number">{interval}</td>',
                        number_cell(estimate.worst, format_score(estimate.worst, metric)),
                        number_cell(
                            row.uplink_bytes_per_round, f"{row.uplink_bytes_per_round or 0:,.0f}"
                        ),
                    ]
                )
    head = ("run", "method", "model", "metric", "mean", "95 %", "worst", "bytes sent per round")
    return document.table_section(
        "summary",
        "Summary",
        "Mean over clients and the worst client, in percent but for losses.",
        document.table(head, ["".join(cells) for cells in rows]),
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
    return document.table_section("clients", "Clients", "", document.table(head, lines))


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
    return document.facts_section(run.name, facts)
