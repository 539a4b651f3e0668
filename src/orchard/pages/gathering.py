"""What a page shows of runs, as rows of plain values; everything is read from their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from orchard.communication.audit import AUDIT_FILE
from orchard.comparison import Comparison, compare_runs
from orchard.evaluation.quality import METRICS, STDERR, plain_metric
from orchard.reports import MODELS, read_result
from orchard.results import MetricsLog

Row: TypeAlias = dict[str, Any]
_PHASES = ("prepare", "train", "evaluation", "overhead")
_GATE, _ACTIVE = "client/gate_mean_", "client/active_share_"
_MAX_EVENTS = 2_000  # a federation of years has more than a page can hold


@dataclass(frozen=True)
class RunRecord:
    """One finished run, as its folder tells it.

    Attributes:
        name: The folder as it was given.
        result: The content of ``result.json``.
        lines: Of ``metrics.jsonl``, in order.
        refusals: Lines of the audit in which something was refused; empty in a simulation.
    """

    name: str
    result: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    refusals: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Gathered:
    """What a page is made of.

    Attributes:
        runs: In the order in which they were given.
        comparison: The same runs, those that differ in their seed alone as one row.
    """

    runs: tuple[RunRecord, ...]
    comparison: Comparison

    @property
    def metrics(self) -> list[str]:
        """Metrics that any run measured, in order."""
        return self.comparison.metrics


def gather(folders: Sequence[str | Path]) -> Gathered:
    """Read runs.

    Raises:
        FileNotFoundError: A run has no result (yet).
        ValueError: A result does not parse, or a run is named twice.
    """
    places = [Path(folder).resolve() for folder in folders]
    twice = [str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ValueError(
            f"runs must be different folders, got {twice[0]} {len(twice)} times; name it once"
        )
    return Gathered(tuple(map(_read_run, folders)), compare_runs(folders))


def _read_run(folder: str | Path) -> RunRecord:
    return RunRecord(
        name=str(folder),
        result=read_result(folder),
        lines=MetricsLog(Path(folder) / "metrics.jsonl").read(),
        refusals=list(_refusals(Path(folder) / AUDIT_FILE)),
    )


def _refusals(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut off; orchard audit says so
            if isinstance(event, dict) and event.get("event") == "refused":
                yield event


def quality_rows(gathered: Gathered) -> list[Row]:
    """Return a row for each method, model and metric, and one for each client's value.

    ``kind`` is ``mean`` (with ``low``, ``high`` and ``worst``) or ``client``. A mean's interval is
    that of ``orchard compare``: over seeds; with one seed ``low`` and ``high`` are the mean itself.
    """
    rows: list[Row] = []
    results = {run.name: run.result for run in gathered.runs}
    for row in gathered.comparison.rows:
        for model, by_metric in row.metrics.items():
            for metric, estimate in by_metric.items():
                shared = {"method": row.name, "model": model, "metric": metric}
                has_interval = estimate.low is not None
                rows.append(
                    {
                        **shared,
                        "kind": "mean",
                        "value": estimate.mean,
                        "low": estimate.low if has_interval else estimate.mean,
                        "high": estimate.high if has_interval else estimate.mean,
                        "worst": estimate.worst,
                        "seeds": len(row.seeds),
                    }
                )
                for run in row.runs:
                    clients = results[run]["metrics"][model][metric]
                    rows += [
                        {**shared, "kind": "client", "run": run, "client": client, "value": value}
                        for client, value in clients.items()
                    ]
    return rows


def curve_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return a row for each round, client, model and metric; the training loss is of no model."""
    rows: list[Row] = []
    for run in runs:
        for line in run.lines:
            if line["kind"] == "client" and "client/train_loss" in line:
                rows.append(
                    {
                        **_where(run, line, line["client"]),
                        "model": "in training",
                        "metric": "training loss",
                        "value": line["client/train_loss"],
                    }
                )
            for client, values in _evaluated(line):
                for key, value in values.items():
                    model, _, metric = key.partition("/")
                    name = plain_metric(metric)
                    if model in MODELS and name in METRICS and not metric.endswith(STDERR):
                        rows.append(
                            {
                                **_where(run, line, client),
                                "model": model,
                                "metric": metric,
                                "value": value,
                            }
                        )
    return rows


def cost_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return what was sent until a round, and the mean over clients of what models reached then.

    ``megabytes`` is what all clients together had sent and been sent since the beginning.
    """
    rows: list[Row] = []
    for run in runs:
        sent, until = 0.0, {0: 0.0}
        for line in run.lines:
            if line["kind"] == "round":
                sent += line["round/uplink_bytes"] + line["round/downlink_bytes"]
                until[line["round"]] = sent
        found: dict[tuple[int, str, str], list[float]] = {}
        for row in curve_rows([run]):
            if row["model"] in MODELS:
                key = row["round"], row["model"], row["metric"]
                found.setdefault(key, []).append(row["value"])
        rows += [
            {
                "run": run.name,
                "round": number,
                "model": model,
                "metric": metric,
                "value": fmean(values),
                "megabytes": until[number] / 1e6,
            }
            for (number, model, metric), values in found.items()
            if number in until
        ]
    return rows


def graft_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return which expert each client grafted in each layer, and what it restores of the output.

    ``restored`` is one less the loss over that of no expert: 1 = all, 0 = no better than none.
    """
    rows: list[Row] = []
    for run in runs:
        gates = {(row["client"], row["layer"]): row["gate"] for row in gate_rows([run])}
        for client, by_layer in run.result.get("grafts", {}).items():
            for layer, own in by_layer.items():
                none, loss = own.get("loss_none"), own.get("loss")
                rows.append(
                    {
                        "run": run.name,
                        "client": client,
                        "layer": layer,
                        "expert": ", ".join(map(str, own["experts"])),
                        "restored": 1 - loss / none if none and loss is not None else None,
                        "loss": loss,
                        "second": own.get("loss_second"),
                        "none": none,
                        "gate": gates.get((client, layer)),
                    }
                )
    return rows


def gate_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return how far each client's gate is open in each layer and round, from 0 to 1."""
    return [
        {
            **_where(run, line, line["client"]),
            "layer": key.removeprefix(_GATE),
            "gate": value,
        }
        for run in runs
        for line in run.lines
        if line["kind"] == "client"
        for key, value in line.items()
        if key.startswith(_GATE)
    ]


def moved_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return in how many rounds each expert was sent by anybody, for runs that train experts."""
    rows: list[Row] = []
    for run in runs:
        counts: dict[tuple[str, int], int] = {}
        rounds = 0
        for line in run.lines:
            if line["kind"] != "round" or "rounds_since_sent" not in line:
                continue
            rounds += 1
            for layer, since in line["rounds_since_sent"].items():
                for expert, number in enumerate(since):
                    key = layer, expert
                    counts[key] = counts.get(key, 0) + (number == 0)
        rows += [
            {
                "run": run.name,
                "layer": layer,
                "expert": expert,
                "times": number,
                "share": number / rounds,
            }
            for (layer, expert), number in counts.items()
        ]
    return rows


def active_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return which share of a layer's experts a client's step trained, as a mean over rounds."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for run in runs:
        for line in run.lines:
            if line["kind"] == "client":
                for key, value in line.items():
                    if key.startswith(_ACTIVE):
                        where = run.name, line["client"], key.removeprefix(_ACTIVE)
                        found.setdefault(where, []).append(value)
    return [
        {"run": run, "client": client, "layer": layer, "share": fmean(values)}
        for (run, client, layer), values in found.items()
    ]


def phase_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return the seconds of each round by what they went to."""
    return [
        {
            "run": run.name,
            "round": line["round"],
            "phase": phase,
            "order": order,
            "seconds": line.get(f"round/{phase}_seconds", 0.0),
        }
        for run in runs
        for line in run.lines
        if line["kind"] == "round"
        for order, phase in enumerate(_PHASES)
    ]


def event_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return clients that left a round, and what was refused, with its reason."""
    rows: list[Row] = []
    for run in runs:
        for line in run.lines:
            if line["kind"] == "round" and line.get("round/num_dropped_out"):
                number = int(line["round/num_dropped_out"])
                rows.append(
                    {
                        "run": run.name,
                        "round": line["round"],
                        "client": f"{number} client{'s' * (number > 1)}",
                        "what": "left the round",
                        "reason": "",
                    }
                )
        rows += [
            {
                "run": run.name,
                "round": event.get("round"),
                "client": str(event.get("site", "")),
                "what": "refused",
                "reason": str(event.get("reason", "")),
            }
            for event in run.refusals
        ]
    return rows[:_MAX_EVENTS]


def client_rows(runs: Iterable[RunRecord]) -> list[Row]:
    """Return a row for each client: its data, its rounds, and what it could afford."""
    rows: list[Row] = []
    for run in runs:
        own: dict[str, list[Mapping[str, Any]]] = {}
        for line in run.lines:
            if line["kind"] == "client":
                own.setdefault(line["client"], []).append(line)
        for client, facts in run.result["clients"].items():
            lines = own.get(client, [])
            row: Row = {
                "run": run.name,
                "client": client,
                "training examples": facts.get("num_train"),
                "test examples": facts.get("num_test"),
                "rounds": len(lines),
                "seconds in training": sum(line.get("client/train_seconds", 0.0) for line in lines),
            }
            if budgets := [line[_BUDGET] for line in lines if _BUDGET in line]:
                row["experts it affords"] = budgets[-1]
                row["experts it trained"] = fmean(
                    line.get("client/trained_experts", 0.0) for line in lines
                )
            rows.append(row)
    return rows


_BUDGET = "client/budget_experts"


def _where(run: RunRecord, line: Mapping[str, Any], client: str) -> Row:
    return {"run": run.name, "round": line["round"], "client": client}


def _evaluated(line: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if line["kind"] == "evaluation":
        yield from line["clients"].items()
    elif line["kind"] == "client":
        yield line["client"], line
