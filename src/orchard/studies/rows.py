"""What a study found, as rows: each method by each metric, beside the reference, with its costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from orchard.client.scores import read_scores
from orchard.evaluation.quality import METRICS, TESTED_ON, plain_metric, tested_on
from orchard.experiment.run_folder import folder_name
from orchard.results import MetricsLog
from orchard.seeding import Seeds
from orchard.studies.bootstrap import Interval, Pair, holm, paired_interval
from orchard.studies.design import Design
from orchard.studies.running import Column, Made, Progress, compared

_LEVEL = 0.05
NOT_SEEN = "no difference seen"


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
        search_seconds: Of these, what a client prepared before it trained, over all rounds, mean
            over clients: with grafts the choice of experts.
        row_seconds: Of the last evaluation, over the rows that it measured: a model's latency, on
            the same rows for all methods.
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
    search_seconds: float
    row_seconds: float
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
    for pair in compared(design, progress):
        own, seeds = pair.own, pair.seeds
        cost = _cost(own, seeds)
        for metric in own.runs[seeds[0]].result["summary"]["personal"]:
            interval = None
            if pair.method != design.reference:
                interval = _interval(own, pair.reference, seeds, metric)
            rows.append(
                Row(
                    cell=pair.cell,
                    method=pair.method,
                    metric=metric,
                    seeds=seeds,
                    interval=interval,
                    corrected_p=None,
                    **_values(own, seeds, metric),
                    **cost,
                )
            )
    with_interval = [index for index, row in enumerate(rows) if row.interval is not None]
    p_values = [found.p for row in rows if (found := row.interval) is not None]
    for index, corrected in zip(with_interval, holm(p_values), strict=True):
        rows[index] = replace(rows[index], corrected_p=corrected)
    return rows


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
    logs = {seed: list(MetricsLog(own.runs[seed].folder / "metrics.jsonl")) for seed in seeds}
    lines = [line for log in logs.values() for line in log if line["kind"] == "client"]
    turns = len(lines)
    per_client = sum(len(result["clients"]) for result in results)
    keys = ("client/train_seconds", "client/own_train_seconds", "client/prepare_seconds")
    seconds = sum(line.get(key, 0.0) for line in lines for key in keys)
    search = sum(line.get("client/prepare_seconds", 0.0) for line in lines)
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
        "search_seconds": search / per_client,
        "row_seconds": fmean(_row_seconds(own.runs[seed], log) for seed, log in logs.items()),
        "options": {"client.lr": results[0]["learning_rate"], **own.chosen.options},
    }


def _row_seconds(made: Made, log: Sequence[Mapping[str, Any]]) -> float:
    """Return how long a row took in the last evaluation, whatever it was a row of."""
    last = [line for line in log if line["kind"] == "evaluation"][-1]
    rows = 0
    for client in last["clients"]:
        folder = made.folder / "clients" / folder_name(client)
        for of in TESTED_ON:
            scores = read_scores(
                folder, round_number=made.result["num_rounds"], model="personal", of=of
            )
            rows += len(next(iter(scores.values()))) if scores else 0
    return float(last["seconds"]) / rows if rows else 0.0


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
