"""What a study found, as rows, and these as a page, as CSV and as a record."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from orchard.client.scores import read_scores
from orchard.evaluation.quality import METRICS, plain_metric, tested_on
from orchard.experiment.run_folder import folder_name
from orchard.reports import format_score
from orchard.results import MetricsLog, environment, write_atomically, write_json
from orchard.seeding import Seeds
from orchard.studies.bootstrap import Interval, Pair, holm, paired_interval
from orchard.studies.design import Design, cell_name
from orchard.studies.running import Column, Made, Progress, seeds_of

_LEVEL = 0.05
NOT_SEEN = "no difference seen"
_HEAD = (
    *("method", "mean", "over seeds", "worst client", "difference [95 %]", "verdict"),
    *("private", "shared", "up", "down", "steps", "seconds", "options", "seeds"),
)


@dataclass(frozen=True)
class Row:
    """One method, in one combination of the grid, by one metric.

    Attributes:
        cell: The combination.
        method: Its name in the study.
        metric: What is measured.
        seeds: Of the runs.
        mean: Over seeds of the mean over clients.
        spread: Standard deviation over seeds of that mean; None with one seed.
        worst: Mean over seeds of the worst client's.
        clients: Client to its mean over the seeds that have it.
        interval: Of the paired difference to the reference; None for the reference.
        corrected_p: Its p by Holm over all comparisons of the report.
        private: Numbers that a client trained and keeps, mean over clients.
        shared: Numbers that the server holds.
        uplink_bytes: That a client sends in a round, mean.
        downlink_bytes: That a client gets in a round, mean.
        steps: Optimizer steps of a client, over all rounds.
        seconds: Of training and preparing, over all clients and rounds, mean over seeds.
        options: What was tuned, and the learning rate of the first round.
    """

    cell: str
    method: str
    metric: str
    seeds: tuple[int, ...]
    mean: float
    spread: float | None
    worst: float
    clients: Mapping[str, float]
    interval: Interval | None
    corrected_p: float | None
    private: float
    shared: float
    uplink_bytes: float
    downlink_bytes: float
    steps: float
    seconds: float
    options: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """What can be said of the difference."""
        if self.interval is None:
            return "reference"
        if self.interval.holds_zero:
            return NOT_SEEN
        higher = METRICS[plain_metric(self.metric)]
        said = "better" if (self.interval.mean > 0) == higher else "worse"
        assert self.corrected_p is not None
        return said if self.corrected_p < _LEVEL else f"{said}, not after Holm"


def build_rows(design: Design, progress: Progress) -> list[Row]:
    """Return the rows of what there is, with the reference first in each table."""
    rows: list[Row] = []
    for cell in map(cell_name, design.cells):
        reference = progress.columns.get((cell, design.reference))
        if reference is None:
            continue
        names = [entry.name for entry in design.entries if entry.name != design.reference]
        costs = {}
        for name in (design.reference, *names):
            column = progress.columns.get((cell, name))
            seeds = seeds_of(design, [reference, column]) if column else ()
            if column is None or not seeds:
                continue
            for metric in _metrics(column.runs[seeds[0]]):
                key = name, seeds
                if key not in costs:
                    costs[key] = _cost(column, seeds)
                rows.append(
                    Row(
                        cell=cell,
                        method=name,
                        metric=metric,
                        seeds=seeds,
                        interval=None
                        if name == design.reference
                        else _interval(column, reference, seeds, metric),
                        corrected_p=None,
                        **_values(column, seeds, metric),
                        **costs[key],
                    )
                )
    compared = [index for index, row in enumerate(rows) if row.interval is not None]
    p_values = [own.p for row in rows if (own := row.interval) is not None]
    for index, corrected in zip(compared, holm(p_values), strict=True):
        rows[index] = replace(rows[index], corrected_p=corrected)
    return rows


def _metrics(made: Made) -> list[str]:
    return list(made.result["summary"]["personal"])


def _values(own: Column, seeds: Sequence[int], metric: str) -> dict[str, Any]:
    results = [own.runs[seed].result for seed in seeds]
    found = [result["summary"]["personal"][metric] for result in results]
    means = [one["mean"] for one in found]
    by_client: dict[str, list[float]] = {}
    for result in results:
        for client, value in result["metrics"]["personal"][metric].items():
            by_client.setdefault(client, []).append(value)
    return {
        "mean": fmean(means),
        "spread": stdev(means) if len(means) > 1 else None,
        "worst": fmean(one["worst"] for one in found),
        "clients": {client: fmean(values) for client, values in by_client.items()},
    }


def _cost(own: Column, seeds: Sequence[int]) -> dict[str, Any]:
    results = [own.runs[seed].result for seed in seeds]
    lines = [
        line
        for seed in seeds
        for line in MetricsLog(own.runs[seed].folder / "metrics.jsonl")
        if line["kind"] == "client"
    ]
    turns = len(lines)
    per_client = sum(len(result["clients"]) for result in results)
    keys = ("client/train_seconds", "client/own_train_seconds", "client/prepare_seconds")
    seconds = sum(line.get(key, 0.0) for line in lines for key in keys)
    steps = sum(
        line.get(key, 0) for line in lines for key in ("client/num_steps", "client/own_num_steps")
    )
    return {
        "private": fmean(fmean(r["parameters"]["private"].values()) for r in results),
        "shared": fmean(result["parameters"]["shared"] for result in results),
        "uplink_bytes": sum(sum(r["uplink_bytes_per_round"]) for r in results) / turns,
        "downlink_bytes": sum(sum(r["downlink_bytes_per_round"]) for r in results) / turns,
        "steps": steps / per_client,
        "seconds": seconds / len(results),
        "options": {"client.lr": results[0]["learning_rate"], **own.chosen.options},
    }


def _interval(own: Column, reference: Column, seeds: Sequence[int], metric: str) -> Interval:
    pairs, is_shared = [], tested_on(metric) == "retention"
    for seed in seeds:
        mine, other = own.runs[seed], reference.runs[seed]
        assert mine.result["test_digest"] == other.result["test_digest"]
        is_shared = is_shared or bool(mine.result["data"]["has_central_test"])
        pairs.append(
            [
                _pair(_scores(mine, client, metric), _scores(other, client, metric), metric)
                for client in mine.result["metrics"]["personal"][metric]
            ]
        )
    generator = Seeds(0).generator("bootstrap", metric)
    return paired_interval(pairs, generator, is_shared=is_shared)


def _scores(made: Made, client: str, metric: str) -> Mapping[str, Sequence[float]]:
    of = tested_on(metric)
    folder = made.folder / "clients" / folder_name(client)
    found = read_scores(folder, round_number=made.result["num_rounds"], model="personal", of=of)
    if found is None:
        raise ValueError(
            f"{folder} must hold the scores of its examples, got none; delete {made.folder} to "
            "run it again"
        )
    return found


def _pair(
    own: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]], metric: str
) -> Pair:
    name = plain_metric(metric)
    ones = np.ones(len(own[name]))
    weight = np.asarray(own["num_tokens"], dtype=float) if name == "loss" else ones
    return Pair(np.asarray(own[name]), np.asarray(reference[name]), weight)


def write_report(design: Design, progress: Progress, out: Path) -> list[Row]:
    """Write ``report.md``, ``report.csv`` and ``study.json`` of what there is."""
    rows = build_rows(design, progress)
    write_atomically(out / "report.md", as_page(design, progress, rows).encode())
    write_atomically(out / "report.csv", as_csv(rows).encode())
    write_json(out / "study.json", as_record(design, progress, rows))
    return rows


def as_page(design: Design, progress: Progress, rows: Sequence[Row]) -> str:
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
        " of one client in the run, seconds those of all clients together.",
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
    *("uplink_bytes", "downlink_bytes", "steps", "seconds", "options"),
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
                *(row.uplink_bytes, row.downlink_bytes, row.steps, row.seconds, options),
            ]
        )
    return file.getvalue()


def as_record(design: Design, progress: Progress, rows: Sequence[Row]) -> dict[str, Any]:
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
        "digest": hashlib.sha256(text.encode()).hexdigest(),
    }


def _row_record(row: Row) -> dict[str, Any]:
    """Return a row for a page, with its difference and its verdict."""
    values = asdict(row)
    values["difference"] = values.pop("interval")
    return {**values, "verdict": row.verdict}


_DIGESTS = ("recipe_digest", "data_digest", "base_digest", "shared_digest", "test_digest")
