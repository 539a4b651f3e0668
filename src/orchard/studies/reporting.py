"""What a study found as a page for people, as CSV and as a record."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchard.reports import format_score
from orchard.results import environment, write_atomically, write_json
from orchard.studies.convergence import Curve, convergence_lines, curves_of
from orchard.studies.design import Design, cell_name
from orchard.studies.rows import NOT_SEEN, Row, build_rows
from orchard.studies.running import Progress

_HEAD = (
    *("method", "mean", "over seeds", "worst client", "difference [95 %]", "verdict"),
    *("private", "shared", "up", "down", "steps", "seconds", "search", "ms a row"),
    *("options", "seeds"),
)


def write_report(design: Design, progress: Progress, out: Path) -> list[Row]:
    """Write ``report.md``, ``report.csv`` and ``study.json`` of what there is."""
    rows, curves = build_rows(design, progress), curves_of(design, progress)
    write_atomically(out / "report.md", as_page(design, progress, rows, curves).encode())
    write_atomically(out / "report.csv", as_csv(rows).encode())
    write_json(out / "study.json", as_record(design, progress, rows, curves))
    return rows


def as_page(
    design: Design, progress: Progress, rows: Sequence[Row], curves: Sequence[Curve] = ()
) -> str:
    """Return the report for people."""
    compared = sum(row.interval is not None for row in rows)
    lines = [f"# {design.title}", ""]
    if progress.num_done < progress.num_runs:
        lines += [f"**{progress.num_done} of {progress.num_runs} runs are there.**", ""]
    lines += [
        f"Every method's personal model, on each client's held-out rows, beside {design.reference}."
        " A difference is the method's value less the reference's, paired by row, client and seed;"
        " its 95 % interval is a bootstrap over seeds, clients and rows. *better* and *worse* hold"
        f" at 5 % after Holm's correction for the {compared} comparisons of this page; an interval"
        f' that holds zero is "{NOT_SEEN}". Bytes are those of one client in one round, steps those'
        " of one client in the run, seconds those of all clients together; of these, search is what"
        " a client took before it trained, with grafts for their choice. ms a row are those of"
        " measuring a row at the end.",
        "",
    ]
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.cell, row.metric), []).append(row)
    for (cell, metric), own in tables.items():
        lines += [f"## {metric}{f', {cell}' if cell else ''}", ""]
        lines += [f"| {' | '.join(_HEAD)} |", f"|---|{'---:|' * (len(_HEAD) - 1)}"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in own]
        lines.append("")
    lines += convergence_lines(curves, design.reference)
    lines += _tuning_lines(design, progress)
    base, commit = progress.base_digest[:16], environment()["commit"] or "unknown"
    lines += [f"Base {base}, commit {commit}; digests of each run are in study.json.", ""]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    interval = row.interval
    difference = ""
    if interval is not None:
        mean, low, high = (
            _signed(value, row.metric) for value in (interval.mean, interval.low, interval.high)
        )
        difference = f"{mean} [{low}, {high}]"
    return (
        row.method,
        format_score(row.mean, row.metric),
        "" if row.spread is None else format_score(row.spread, row.metric),
        format_score(row.worst, row.metric),
        difference,
        row.verdict,
        f"{row.private:,.0f}",
        f"{row.shared:,.0f}",
        f"{row.uplink_bytes:,.0f}",
        f"{row.downlink_bytes:,.0f}",
        f"{row.steps:,.0f}",
        f"{row.seconds:,.0f}",
        f"{row.search_seconds:,.1f}",
        f"{1000 * row.row_seconds:,.0f}",
        ", ".join(
            f"{key.rpartition('.')[2]} {value:g}"
            if isinstance(value, float)
            else f"{key.rpartition('.')[2]} {value}"
            for key, value in row.options.items()
        ),
        " ".join(map(str, row.seeds)),
    )


def _signed(value: float, metric: str) -> str:
    return f"{value:+.4f}" if metric.endswith("loss") else f"{100 * value:+.2f}"


def _tuning_lines(design: Design, progress: Progress) -> list[str]:
    tuning = design.tuning
    if tuning is None:
        return ["Nothing was tuned: every method runs as its recipe says.", ""]
    lines = [
        "## Tuning",
        "",
        f"The same {len(tuning.choices)} choices for every method, on {tuning.validation_size:g} of"
        f" each client's training rows that the choosing runs do not train on, by {tuning.metric},"
        f" seeds {' '.join(map(str, tuning.seeds))}; no test row is read.",
        "",
        "| grid | method | tried: value | chosen |",
        "|---|---|---|---|",
    ]
    for (cell, method), column in progress.columns.items():
        tried = "; ".join(f"{cell_name(own)}: {value:.4f}" for own, value in column.chosen.tried)
        end = ", at the end of its grid" if column.chosen.is_at_the_end else ""
        lines.append(f"| {cell} | {method} | {tried} | {cell_name(column.chosen.options)}{end} |")
    return [*lines, ""]


_CSV = (
    *("cell", "method", "metric", "seeds", "mean", "spread", "worst", "difference", "low_95"),
    *("high_95", "p", "p_holm", "verdict", "private_parameters", "shared_parameters"),
    *("uplink_bytes", "downlink_bytes", "steps", "seconds", "search_seconds", "row_seconds"),
    "options",
)


def as_csv(rows: Sequence[Row]) -> str:
    """Return the rows for programs."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV)
    for row in rows:
        own = row.interval
        interval = (own.mean, own.low, own.high, own.p) if own else (None,) * 4
        seeds = ";".join(map(str, row.seeds))
        options = ";".join(f"{key}={value}" for key, value in row.options.items())
        writer.writerow(
            [
                *(row.cell, row.method, row.metric, seeds, row.mean, row.spread, row.worst),
                *(*interval, row.corrected_p, row.verdict, row.private, row.shared),
                *(row.uplink_bytes, row.downlink_bytes, row.steps, row.seconds),
                *(row.search_seconds, row.row_seconds, options),
            ]
        )
    return file.getvalue()


def as_record(
    design: Design, progress: Progress, rows: Sequence[Row], curves: Sequence[Curve] = ()
) -> dict[str, Any]:
    """Return what a study was and found; ``digest`` is over all but seconds and bytes."""
    columns = []
    for (cell, method), column in progress.columns.items():
        runs = [
            {
                "seed": seed,
                "folder": made.folder.name,
                **{key: made.result[key] for key in _DIGESTS},
            }
            for seed, made in column.runs.items()
        ]
        columns.append(
            {
                "cell": cell,
                "method": method,
                "options": dict(column.chosen.options),
                "tried": [[dict(own), repr(value)] for own, value in column.chosen.tried],
                "runs": runs,
            }
        )
    found = [[row.cell, row.method, row.metric, row.mean, row.worst, row.verdict] for row in rows]
    text = json.dumps([columns, found], sort_keys=True)
    return {
        "title": design.title,
        "reference": design.reference,
        "num_runs": progress.num_runs,
        "num_done": progress.num_done,
        **environment(),
        "base_digest": progress.base_digest,
        "columns": columns,
        "rows": [_row_record(row) for row in rows],
        "curves": [curve.as_record() for curve in curves],
        "digest": hashlib.sha256(text.encode()).hexdigest(),
    }


def _row_record(row: Row) -> dict[str, Any]:
    """Return a row for a page, with its difference and its verdict."""
    values = asdict(row)
    values["difference"] = values.pop("interval")
    return {**values, "verdict": row.verdict}


_DIGESTS = ("recipe_digest", "data_digest", "base_digest", "shared_digest", "test_digest")
