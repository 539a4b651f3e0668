"""How fast methods learn: the round from which each is as good as the reference at its end.

Of runs that are measured more than once (``evaluation.every``). The level is the reference's mean
over clients after its last round, under the same seed, and a method reaches it in the first
measured round whose mean over clients is at least as good; the reference may, too, before its end.
A round between two measured ones is not seen, so a number of rounds is up to
``evaluation.every`` - 1 too large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from orchard.evaluation.quality import METRICS, plain_metric
from orchard.reports import format_rounds, format_score
from orchard.results import MetricsLog
from orchard.studies.design import Design
from orchard.studies.running import Column, Made, Progress, compared


@dataclass(frozen=True)
class Curve:
    """How one method learned, in one combination of the grid, by one metric.

    Attributes:
        cell: The combination.
        method: Its name in the study.
        metric: What is measured.
        values: Round to the mean over seeds of the mean over clients.
        rounds: Seed to the round that reached the reference's level; None = none did.
        times_as_fast: The reference's round over the method's, mean over the seeds that reached
            the level; None where none did.
    """

    cell: str
    method: str
    metric: str
    values: Mapping[int, float]
    rounds: Mapping[int, int | None]
    times_as_fast: float | None

    def as_record(self) -> dict[str, Any]:
        """Return it for ``study.json``, whose keys are texts."""
        return asdict(self) | {
            "values": {str(number): value for number, value in self.values.items()},
            "rounds": {str(seed): number for seed, number in self.rounds.items()},
        }


def curves_of(design: Design, progress: Progress) -> list[Curve]:
    """Return the curves of what there is, with the reference first in each table."""
    curves: list[Curve] = []
    measured: dict[str, Mapping[int, Mapping[str, Mapping[int, float]]]] = {}  # of the reference
    for pair in compared(design, progress):
        if pair.cell not in measured:
            runs = pair.reference.runs
            measured[pair.cell] = {seed: _by_round(made) for seed, made in runs.items()}
        of_reference = {seed: measured[pair.cell][seed] for seed in pair.seeds}
        curves += _curves(pair.cell, pair.method, pair.own, of_reference)
    return curves


def first_at(values: Mapping[int, float], level: float, *, is_higher_better: bool) -> int | None:
    """Return the first round whose value is at least as good as ``level``; None = none is."""
    for number, value in sorted(values.items()):
        if (value >= level) if is_higher_better else (value <= level):
            return number
    return None


def _curves(
    cell: str,
    name: str,
    column: Column,
    of_reference: Mapping[int, Mapping[str, Mapping[int, float]]],
) -> list[Curve]:
    """Return a method's curves; none where a run was measured once."""
    own = {seed: _by_round(column.runs[seed]) for seed in of_reference}
    first = next(iter(own.values()))
    found = []
    for metric in first:
        curves = [own[seed][metric] for seed in own]
        if any(len(values) < 2 for values in curves):
            continue
        higher = METRICS[plain_metric(metric)]
        rounds, ratios = {}, []
        for seed, known in of_reference.items():
            level = known[metric][max(known[metric])]
            rounds[seed] = first_at(own[seed][metric], level, is_higher_better=higher)
            base = first_at(known[metric], level, is_higher_better=higher)
            assert base is not None, "a curve reaches its own end"
            if (number := rounds[seed]) is not None:
                ratios.append(base / number)
        common = sorted(set.intersection(*(set(values) for values in curves)))
        means = {number: fmean(values[number] for values in curves) for number in common}
        fast = fmean(ratios) if ratios else None
        found.append(Curve(cell, name, metric, means, rounds, fast))
    return found


def _by_round(made: Made) -> dict[str, dict[int, float]]:
    """Return metric to round to the mean over the clients of the personal model."""
    found: dict[str, dict[int, float]] = {}
    for line in MetricsLog(made.folder / "metrics.jsonl"):
        if line["kind"] != "evaluation":
            continue
        for metric in made.result["summary"]["personal"]:
            key = f"personal/{metric}"
            values = [own[key] for own in line["clients"].values() if key in own]
            if values:
                found.setdefault(metric, {})[line["round"]] = fmean(values)
    return found


def convergence_lines(curves: Sequence[Curve], reference: str) -> list[str]:
    """Return the part of a report about them: a table for each metric; nothing without a curve."""
    tables: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        tables.setdefault((curve.cell, curve.metric), []).append(curve)
    lines = []
    for (cell, metric), own in tables.items():
        numbers = sorted({number for curve in own for number in curve.values})
        head = ("method", "round by seed", "times as fast", *(f"round {n}" for n in numbers))
        lines += [
            f"## Rounds until as good as {reference} at its end: {metric}"
            f"{f', {cell}' if cell else ''}",
            "",
            f"| {' | '.join(head)} |",
            f"|---|{'---:|' * (len(head) - 1)}",
            *(f"| {' | '.join(_cells(curve, numbers))} |" for curve in own),
            "",
        ]
    return lines


def _cells(curve: Curve, numbers: Sequence[int]) -> tuple[str, ...]:
    reached = [number for number in curve.rounds.values() if number is not None]
    fast = ""
    if curve.times_as_fast is not None:
        fast = f"{curve.times_as_fast:.2f}"
        if len(reached) < len(curve.rounds):
            fast += f" ({len(reached)} of {len(curve.rounds)} seeds)"
    return (
        curve.method,
        format_rounds(curve.rounds.values()),
        fast,
        *(
            format_score(curve.values[number], curve.metric) if number in curve.values else ""
            for number in numbers
        ),
    )
