"""Tables from saved results, never from live objects."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.markup import escape
from rich.table import Table

from orchard.data.examples import Example
from orchard.endings import ending_notes, graft_record
from orchard.evaluation.quality import ARRIVING, METRICS, STDERR, plain_metric, tested_on
from orchard.evaluation.rouge import summarize
from orchard.results import MetricsLog

MODELS = ("base", "global", "local", "personal")


def build_result(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Build the content of ``result.json`` from ``metrics.jsonl``.

    Args:
        folder: The run's folder.
        facts: What the log does not have: versions, hardware, seed, clients.

    Returns:
        JSON values: ``facts``; ``num_rounds``; ``seconds`` and ``overhead_share``;
        ``peak_memory_bytes``; bytes and training loss of each round; ``metrics``, by model, metric
        and client; ``summary``, by model and metric, with the mean over clients, the worst client,
        and the spread (the standard deviation over clients), and where the metric has a standard
        error, that of the mean.
    """
    lines = MetricsLog(folder / "metrics.jsonl").read()
    rounds = [line for line in lines if line["kind"] == "round"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    seconds = math.fsum(line["round/seconds"] for line in rounds)
    overhead = math.fsum(line["round/overhead_seconds"] for line in rounds)
    metrics = _apart(_latest_metrics(lines), facts.get("arriving", ()))
    losses, grafts = [line.get("round/train_loss") for line in rounds], graft_record(lines)
    return {
        **facts,
        "num_rounds": len(rounds),
        "seconds": {
            "rounds": seconds,
            "training": math.fsum(line["round/train_seconds"] for line in rounds),
            "evaluation": math.fsum(line["seconds"] for line in evaluations)
            + math.fsum(line.get("client/evaluation_seconds", 0.0) for line in lines),
            "overhead": overhead,
        },
        "overhead_share": overhead / seconds if seconds else 0.0,
        "peak_memory_bytes": max((line["round/peak_memory_bytes"] for line in rounds), default=0),
        "uplink_bytes_per_round": [line["round/uplink_bytes"] for line in rounds],
        "downlink_bytes_per_round": [line["round/downlink_bytes"] for line in rounds],
        "train_loss_per_round": losses,
        **({"grafts": grafts} if grafts else {}),
        "notes": ending_notes(losses, grafts, learning_rate=facts.get("learning_rate")),
        "metrics": metrics,
        "summary": _summarize(
            metrics, has_central_test=facts.get("data", {}).get("has_central_test", False)
        ),
    }


def _latest_metrics(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return model, metric, client to the value of the last evaluation."""
    latest: dict[str, dict[str, dict[str, float]]] = {}
    for line in lines:
        if line["kind"] == "evaluation":
            per_client = line["clients"]
        elif line["kind"] == "client":
            per_client = {line["client"]: line}
        else:
            continue
        for client, values in per_client.items():
            for key, value in values.items():
                model, _, metric = key.partition("/")
                name = plain_metric(metric).removesuffix(STDERR)
                # A log from before sites were held to what they are asked has other names too.
                if model in MODELS and name in METRICS:
                    latest.setdefault(model, {}).setdefault(metric, {})[client] = value
    return {model: latest[model] for model in MODELS if model in latest}


def _apart(
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]], arriving: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return metrics with those of clients that arrived after training under names of their own."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model, by_metric in metrics.items():
        for metric, values in by_metric.items():
            for client, value in values.items():
                name = f"{ARRIVING}{metric}" if client in arriving else metric
                found.setdefault(model, {}).setdefault(name, {})[client] = value
    return found


def _summarize(
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]], *, has_central_test: bool
) -> dict[str, dict[str, dict[str, float]]]:
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for model, by_metric in metrics.items():
        for metric, values in by_metric.items():
            if metric.endswith(STDERR):
                continue
            is_retention = tested_on(metric) == "retention"
            better = METRICS[plain_metric(metric)]
            found = summarize(values, higher_is_better=better)
            summary.setdefault(model, {})[metric] = {
                "mean": found.mean,
                "worst": found.worst,
                "spread": found.spread,
            }
            errors = by_metric.get(metric + STDERR)
            if errors:
                # What clients must retain is the same for all.
                summary[model][metric]["mean_stderr"] = mean_stderr(
                    list(errors.values()), is_shared=has_central_test or is_retention
                )
    return summary


def mean_stderr(errors: Sequence[float], *, is_shared: bool) -> float:
    """Return the standard error of a mean over clients, from those of the clients.

    Args:
        errors: The standard error of each client's value.
        is_shared: Whether all clients were measured on the same examples. Then their errors go
            together and averaging removes none: the mean of the errors is exact for one model and
            the most it can be for several. Otherwise they are independent.
    """
    if is_shared:
        return fmean(errors)
    return math.hypot(*errors) / len(errors)


def read_result(folder: str | Path) -> dict[str, Any]:
    """Read a run's result.

    Raises:
        FileNotFoundError: The run has none (yet).
        ValueError: It does not parse.
    """
    path = Path(folder) / "result.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"run must be a folder with a result.json, got {folder}; "
            "finish the run first: orchard run RECIPE --out DIR --resume"
        )
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"result.json must be valid JSON, got {path} with: {error}") from error
    if not isinstance(result, dict) or not {"strategy", "seed", "summary"} <= set(result):
        raise ValueError(
            f"result.json must be the result of a run, got {path}, which has no strategy, seed or "
            "summary; --resume writes it again"
        )
    return result


def result_table(result: Mapping[str, Any]) -> Table:
    """Return one run as a table: a row per model, a column per client, then mean, worst, spread."""
    clients = list(result["clients"])
    table = Table(title=f"{result['strategy']}, seed {result['seed']}", title_justify="left")
    table.add_column("metric")
    table.add_column("model")
    for client in clients:
        table.add_column(escape(client), justify="right")
    for name in ("mean", "worst", "spread"):
        table.add_column(name, justify="right")
    metrics = result["metrics"]
    names = list(dict.fromkeys(m for by in result["summary"].values() for m in by))
    for metric in names:
        for position, model in enumerate(model for model in metrics if metric in metrics[model]):
            values = metrics[model][metric]
            errors = metrics[model].get(metric + STDERR, {})
            summary = result["summary"][model][metric]
            table.add_row(
                metric if position == 0 else "",
                model,
                *(
                    format_score(values[client], metric, errors.get(client))
                    if client in values
                    else ""
                    for client in clients
                ),
                format_score(summary["mean"], metric, summary.get("mean_stderr")),
                *(format_score(summary[name], metric) for name in ("worst", "spread")),
            )
        table.add_section()
    return table


def run_sentence(result: Mapping[str, Any], folder: Path) -> str:
    """Say what a run cost and where its record is."""
    seconds, uplink = result["seconds"], result["uplink_bytes_per_round"]
    return (
        f"{result['num_rounds']} rounds in {seconds['rounds']:.0f} s (training "
        f"{seconds['training']:.0f} s, overhead {100 * result['overhead_share']:.1f} %), "
        f"{sum(uplink) / len(uplink) / 1e6:.3f} MB sent by clients per round, peak memory "
        f"{result['peak_memory_bytes'] / 1e9:.2f} GB; everything is in {folder}"
    )


def partition_table(
    train: Mapping[str, Sequence[Example]], test: Mapping[str, Sequence[Example]]
) -> Table:
    """Return who holds how much: training examples of each category, and both splits' sizes."""
    counts = {client: Counter(e.category for e in examples) for client, examples in train.items()}
    categories = sorted({category for counter in counts.values() for category in counter})
    table = Table("client", title="training examples by category", title_justify="left")
    for name in (*(category or "(none)" for category in categories), "train", "test"):
        table.add_column(escape(name), justify="right")
    for client, counter in counts.items():
        sizes = (*(counter[category] for category in categories), len(train[client]))
        table.add_row(escape(client), *map(str, (*sizes, len(test[client]))))
    return table


def format_score(value: float, metric: str, stderr: float | None = None) -> str:
    """Return a loss with three digits, anything else in percent, with its standard error if any."""
    if metric.endswith("loss"):
        return f"{value:.3f}"
    return f"{100 * value:.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def format_rounds(rounds: Iterable[int | None]) -> str:
    """Return the round of each seed in one line; None is never."""
    return " ".join("never" if number is None else str(number) for number in rounds)
