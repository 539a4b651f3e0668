"""Several runs beside each other; those that differ in their seed alone are one row.

Over seeds a mean stands with its 95 % interval by Student's t, which takes the runs' values as
independent and normal. The seed also draws partitions, cohorts and fresh adapters, so all of that
is in it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from orchard.experiment.run_folder import RECIPE_FILE, recipe_digest
from orchard.recipe.options import Recipe
from orchard.recipe.reading import known_options, option_value, read_recipe
from orchard.reports import format_score, read_result

_LEVEL = 0.95
_CSV_COLUMNS = (
    *("runs", "strategy", "seeds", "model", "metric"),
    *("mean", "low_95", "high_95", "worst", "uplink_bytes_per_round"),
)


@dataclass(frozen=True)
class Estimate:
    """One metric of one model, over the seeds of a row.

    Attributes:
        mean: Over seeds of the mean over clients.
        low: Where its interval begins; None with one seed.
        high: Where it ends; None with one seed.
        worst: Mean over seeds of the worst client's.
        stderr: Standard error over examples, where the metric has one; None with several seeds.
        per_seed: Mean over clients by seed, in the order of the row's runs.
    """

    mean: float
    low: float | None
    high: float | None
    worst: float
    stderr: float | None
    per_seed: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """Runs that are one but for their seeds.

    Attributes:
        runs: Their folders.
        strategy: Their method.
        seeds: Of each run.
        uplink_bytes_per_round: Mean over rounds and seeds; None without any round.
        metrics: Model and metric to what was measured.
    """

    runs: tuple[str, ...]
    strategy: str
    seeds: tuple[int, ...]
    uplink_bytes_per_round: float | None
    metrics: Mapping[str, Mapping[str, Estimate]]

    @property
    def name(self) -> str:
        """The folder, or what all folders begin with."""
        if len(self.runs) == 1:
            return self.runs[0]
        start = os.path.commonprefix(self.runs)  # noqa: RUF071, of names, not of folders
        return f"{start}* ({len(self.runs)} runs)"

    @property
    def about(self) -> str:
        """Method and seeds."""
        return f"{self.strategy}, seed{'s' * (len(self.seeds) > 1)} {_ranges(self.seeds)}"


@dataclass(frozen=True)
class Comparison:
    """Rows, and what a reader should know of them.

    Attributes:
        rows: In the order of their first runs.
        differing: Options, other than the seed, that are not the same in all runs.
        notes: Why runs that might be one row are not.
        incomparable: Why rows cannot be ranked: another base, other test data, or not known.
    """

    rows: tuple[Row, ...]
    differing: tuple[str, ...]
    notes: tuple[str, ...]
    incomparable: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """Every metric that any row has, in order."""
        found = (m for row in self.rows for by in row.metrics.values() for m in by)
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class _Read:
    name: str
    result: Mapping[str, Any]
    recipe: Recipe | None


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Read results and join those of runs that differ in their seed alone.

    Recipe and base must be the same for that, and every seed another: a run that was made twice
    would make an interval narrower than it is.

    Raises:
        FileNotFoundError: A run has no result (yet).
        ValueError: A result does not parse.
    """
    notes: list[str] = []
    groups: dict[object, list[_Read]] = {}
    read = [_read(Path(folder), notes) for folder in folders]
    for run in read:
        groups.setdefault(_key(run), []).append(run)
    rows: list[Row] = []
    for runs in groups.values():
        seeds = [run.result["seed"] for run in runs]
        if len(set(seeds)) == len(seeds):
            rows.append(_join(runs))
            continue
        rows += [_join([run]) for run in runs]
        notes.append(f"{', '.join(run.name for run in runs)} are not joined: a seed comes twice")
    recipes = [run.recipe for run in read if run.recipe is not None]
    differing = tuple(
        key
        for key in known_options()
        if key != "seed" and len({option_value(recipe, key) for recipe in recipes}) > 1
    )
    return Comparison(tuple(rows), differing, tuple(notes), _incomparable(read))


def _incomparable(read: Sequence[_Read]) -> tuple[str, ...]:
    """Return sentences on what runs must share to be ranked, and do not.

    A seed draws a test split too, so test data is compared between runs of one seed; runs without
    any seed in common were measured on different examples unless they have one test set.
    """
    sentences = []
    for key, what in (("base_digest", "the base model"), ("test_digest", "the test data")):
        found: dict[str, list[_Read]] = {}
        for run in read:
            found.setdefault(run.result.get(key) or "", []).append(run)
        unknown = found.pop("", [])
        if _differ(found, is_drawn=key == "test_digest"):
            groups = "; ".join(", ".join(run.name for run in runs) for runs in found.values())
            sentences.append(f"{what} is not the same, so these are not to be ranked: {groups}")
        if unknown and len(read) > 1:
            names = ", ".join(run.name for run in unknown)
            sentences.append(f"whether {what} is the same is not known of {names}")
    return tuple(sentences)


def _differ(found: Mapping[str, Sequence[_Read]], *, is_drawn: bool) -> bool:
    """Say whether runs with different digests should have had one."""
    if len(found) < 2 or not is_drawn:
        return len(found) > 1
    by_seed: dict[int, set[str]] = {}
    by_row: dict[object, set[int]] = {}
    for digest, runs in found.items():
        for run in runs:
            by_seed.setdefault(run.result["seed"], set()).add(digest)
            by_row.setdefault(_key(run), set()).add(run.result["seed"])
    seeds = list(by_row.values())
    is_apart = any(not one & other for one in seeds for other in seeds)
    return is_apart or any(len(digests) > 1 for digests in by_seed.values())


def _read(folder: Path, notes: list[str]) -> _Read:
    result, recipe = read_result(folder), None
    try:
        recipe = read_recipe(folder / RECIPE_FILE).recipe
    except (OSError, ValueError) as error:
        notes.append(f"{folder} is a row of its own: {error}")
    return _Read(str(folder), result, recipe)


def _key(run: _Read) -> object:
    """Return what runs of one row have in common."""
    if run.recipe is None:
        return id(run)
    recipe = recipe_digest(replace(run.recipe, seed=0))
    return recipe, run.result["strategy"], run.result.get("base_digest")


def _join(runs: Sequence[_Read]) -> Row:
    results = [run.result for run in runs]
    uplinks = [fmean(r["uplink_bytes_per_round"]) for r in results if r["uplink_bytes_per_round"]]
    first = results[0]["summary"]
    metrics = {
        model: {
            metric: _estimate([result["summary"][model][metric] for result in results])
            for metric in by_metric
            if all(metric in result["summary"].get(model, {}) for result in results)
        }
        for model, by_metric in first.items()
    }
    return Row(
        runs=tuple(run.name for run in runs),
        strategy=results[0]["strategy"],
        seeds=tuple(result["seed"] for result in results),
        uplink_bytes_per_round=fmean(uplinks) if uplinks else None,
        metrics=metrics,
    )


def _estimate(summaries: Sequence[Mapping[str, float]]) -> Estimate:
    values = [summary["mean"] for summary in summaries]
    mean, half = fmean(values), half_interval(values)
    return Estimate(
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        worst=fmean(summary["worst"] for summary in summaries),
        stderr=summaries[0].get("mean_stderr") if len(summaries) == 1 else None,
        per_seed=tuple(values),
    )


def half_interval(values: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of a mean by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    return student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def student_t(freedom: int, level: float = _LEVEL) -> float:
    """Return the bound within which Student's t stays with a probability.

    Args:
        freedom: Degrees of freedom, at least 1.
        level: The probability, above 0 and below 1.
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return high


def _within(bound: float, freedom: int) -> float:
    """Return the probability that Student's t is within a bound of 0.

    Source: Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.7.3 and 26.7.4: a
    finite sum for whole degrees of freedom.
    """
    angle = math.atan(bound / math.sqrt(freedom))
    cosine = math.cos(angle)
    term, total = (cosine if freedom % 2 else 1.0), 0.0
    for power in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    if freedom % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def comparison_table(comparison: Comparison, console: Console) -> Table:
    """Return a column for each metric where a console is wide enough, else a row for each."""
    wide = _wide_table(comparison)
    fits = Measurement.get(console, console.options.update(max_width=10_000), wide)
    return wide if fits.maximum <= console.width else _narrow_table(comparison)


def _title(comparison: Comparison) -> str:
    title = "mean over clients (worst client)"
    if any(len(row.seeds) > 1 for row in comparison.rows):
        title += "; in brackets the mean's 95 % interval over seeds"
    return title


def _wide_table(comparison: Comparison) -> Table:
    table = Table("run", "method", "model", title=_title(comparison), title_justify="left")
    for name in (*comparison.metrics, "uplink per round"):
        table.add_column(name, justify="right")
    for row in comparison.rows:
        for position, (model, by_metric) in enumerate(row.metrics.items()):
            cells = [_cell(by_metric.get(metric), metric) for metric in comparison.metrics]
            first = (escape(row.name), escape(row.about), model, *cells, _uplink(row))
            table.add_row(*(first if position == 0 else ("", "", model, *cells, "")))
        table.add_section()
    return table


def _narrow_table(comparison: Comparison) -> Table:
    """Return a table of two columns; whatever is compared stands below each other."""
    table = Table(title=_title(comparison), title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    models = dict.fromkeys(model for row in comparison.rows for model in row.metrics)
    for metric in comparison.metrics:
        for model in models:
            measured = [(row, row.metrics.get(model, {}).get(metric)) for row in comparison.rows]
            if any(estimate for _, estimate in measured):
                table.add_row(f"[bold]{metric}, {model}[/bold]", "")
                for row, estimate in measured:
                    if estimate:
                        table.add_row(escape(f"{row.name}: {row.about}"), _cell(estimate, metric))
                table.add_section()
    table.add_row("[bold]uplink per round[/bold]", "")
    for row in comparison.rows:
        table.add_row(escape(f"{row.name}: {row.about}"), _uplink(row))
    return table


def _cell(estimate: Estimate | None, metric: str) -> str:
    if estimate is None:
        return ""
    text = format_score(estimate.mean, metric, estimate.stderr)
    if estimate.low is not None and estimate.high is not None:
        text += f" [{format_score(estimate.low, metric)}, {format_score(estimate.high, metric)}]"
    return f"{text} ({format_score(estimate.worst, metric)})"


def _uplink(row: Row) -> str:
    return "" if row.uplink_bytes_per_round is None else f"{row.uplink_bytes_per_round:,.0f} B"


def comparison_as_json(comparison: Comparison) -> str:
    """Return a comparison for programs."""
    about = {"interval": "95 % of Student's t over seeds", **asdict(comparison)}
    return json.dumps(about, indent=1)


def comparison_as_csv(comparison: Comparison) -> str:
    """Return a line for each row, model and metric; several runs or seeds are set apart by ;."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in comparison.rows:
        for model, by_metric in row.metrics.items():
            for metric, estimate in by_metric.items():
                numbers = (estimate.mean, estimate.low, estimate.high, estimate.worst)
                seeds = ";".join(map(str, row.seeds))
                about = (";".join(row.runs), row.strategy, seeds, model, metric)
                writer.writerow([*about, *numbers, row.uplink_bytes_per_round])
    return file.getvalue()


def comparison_as_latex(comparison: Comparison) -> str:
    """Return a booktabs tabular: a line for each row and model, a column for each metric."""
    metrics = comparison.metrics
    lines = [
        "% Mean over clients, in percent except for losses; with several seeds the mean over them,",
        "% and behind \\pm half of its 95 % interval by Student's t. Needs \\usepackage{booktabs}.",
        rf"\begin{{tabular}}{{ll{'r' * len(metrics)}}}",
        r"\toprule",
        _latex_line(["method", "model", *map(_latex, metrics)]),
        r"\midrule",
    ]
    for row in comparison.rows:
        for model, by_metric in row.metrics.items():
            cells = [_latex_cell(by_metric.get(metric), metric) for metric in metrics]
            lines.append(_latex_line([_latex(row.about), model, *cells]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_line(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _latex_cell(estimate: Estimate | None, metric: str) -> str:
    if estimate is None:
        return ""
    text = format_score(estimate.mean, metric)
    if estimate.high is not None:
        text += rf" \pm {format_score(estimate.high - estimate.mean, metric)}"
    return f"${text}$"


def _latex(text: str) -> str:
    escaped = {c: f"\\{c}" for c in "&%$#_{}"}
    escaped |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escaped.get(character, character) for character in text)


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers in order, neighbors from the third on as a range: 0-4, 7."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in found
    )
