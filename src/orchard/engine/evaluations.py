"""What sites are asked to measure after a round, and which of them still owe it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchard.communication.door import MAX_VALUE
from orchard.engine.simulator import Schedule
from orchard.evaluation.quality import METRICS, STDERR
from orchard.results import MetricsLog

Ranges = Mapping[str, tuple[float, float]]
"""Metric to the range that its values are in."""
_WITH_ERROR = ("accuracy",)  # metrics that come with their standard error


def measured_ranges(metrics: Iterable[str] = METRICS) -> dict[str, tuple[float, float]]:
    """Return what a site may answer that is asked for some metrics, with the range of each.

    A metric of which more is better is a share; a loss is at least 0. Each may also be of
    what a model must retain.
    """
    found = {}
    for metric in metrics:
        high = 1.0 if METRICS[metric] else MAX_VALUE
        for name in (metric, f"retention_{metric}"):
            found[name] = (0.0, high)
            if metric in _WITH_ERROR:
                found[f"{name}{STDERR}"] = (0.0, high)
    return found


@dataclass(frozen=True)
class Measured:
    """What sites measured of models.

    Attributes:
        clients: Site to ``model/metric`` to value.
        seconds: The longest that one of them took.
    """

    clients: Mapping[str, Mapping[str, float]]
    seconds: float


def models_due(
    schedule: Schedule, log: MetricsLog, sites: Sequence[str], *, round_number: int
) -> dict[str, tuple[str, ...]]:
    """Return which models each site has not yet measured as they are after a round.

    A site that could not be asked when others were owes them still.
    """
    due: Collection[str] = ()
    if round_number == 0:
        due = set(schedule.models) & {"base"}
    elif schedule.has_evaluation(round_number):
        due = set(schedule.models) & {"global", "personal"}
    if not due:
        return {}
    done: dict[str, set[str]] = {}
    for line in log:
        if line["kind"] == "evaluation" and line["round"] == round_number:
            for site, values in line["clients"].items():
                done.setdefault(site, set()).update(key.partition("/")[0] for key in values)
    left = {site: tuple(sorted(set(due) - done.get(site, set()))) for site in sites}
    return {site: models for site, models in left.items() if models}
