"""The page of the ablation of HFedMoE, from results/."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.blocks import Finding, Page, findings, head, paragraph, row
from benchmarks.blocks import table as small_table
from benchmarks.hfedmoe_ablation.grid import (
    AGGREGATIONS,
    RANKINGS,
    SELECTIONS,
    THRESHOLDS,
    TITLES,
    Cell,
    distinct,
    grid,
    read_results,
)
from benchmarks.records import origins

HERE = Path(__file__).parent
BY_ROUTING = RANKINGS[1:]


def page() -> Page:
    """Return what is made of the results that are here."""
    results = read_results(HERE / "results")
    return Page(
        HERE,
        {
            "random": _random_table(results),
            "findings": findings(_findings(results)),
            "origin": paragraph(origins(results.values())),
        },
        {"table.md": table(results)},
    )


Results = Mapping[Cell, Mapping[str, Any]]


def _cell(results: Results, cell: Cell) -> Mapping[str, Any]:
    return results[cell.representative()]


def _accuracy(results: Results, cell: Cell) -> float:
    return 100 * float(_cell(results, cell)["accuracy"])


def _columns(aggregation: str) -> tuple[float, ...]:
    """Return the thresholds that an aggregation knows."""
    return THRESHOLDS[:1] if aggregation == "fedavg" else THRESHOLDS


def _random_and_routing(
    results: Results, aggregation: str, budget: int
) -> list[tuple[float, list[float]]]:
    """Return random choice, and the choices by routing, for each threshold."""
    return [
        (
            _accuracy(results, Cell("random", budget, aggregation, threshold)),
            [_accuracy(results, Cell(r, budget, aggregation, threshold)) for r in BY_ROUTING],
        )
        for threshold in _columns(aggregation)
    ]


def _random_table(results: Results) -> str:
    """Return random choice minus the mean of the choices by routing."""
    rows = []
    for aggregation in AGGREGATIONS:
        for budget in (25, 50, 78):
            cells = []
            for random, others in _random_and_routing(results, aggregation, budget):
                shift = f"{random - fmean(others):+.1f}"
                is_outside = not min(others) <= random <= max(others)
                cells.append(f"**{shift}**" if is_outside else shift)
            rows.append(
                [aggregation, f"{budget} %", *cells, *[""] * (len(THRESHOLDS) - len(cells))]
            )
    heads = [f"{value:g}" for value in THRESHOLDS]
    return small_table(["aggregation", "budget", *heads], rows, num_words=2)


def _means(results: Results, aggregation: str, what: str = "accuracy") -> dict[float, float]:
    """Return threshold to the mean over the rows of a table."""
    return {
        value: fmean(_cell(results, Cell(s, b, aggregation, value))[what] for s, b in _rows())
        for value in _columns(aggregation)
    }


def _percent(values: Mapping[float, float]) -> dict[float, float]:
    return {key: 100 * value for key, value in values.items()}


def _findings(results: Results) -> list[Finding]:
    every = list(results.values())
    error = 100 * max(result["accuracy_stderr"] for result in every)
    start = 100 * fmean(result["start_accuracy"] for result in every)
    plain, selective, weighted, literal = (_percent(_means(results, a)) for a in AGGREGATIONS)
    sent = _percent(_means(results, "selective", "pass_rate"))
    frozen = _means(results, "selective", "frozen_experts")
    norms = _means(results, "literal", "router_norm_ratio")
    [(random_25, routing_25)] = _random_and_routing(results, "fedavg", 25)
    [(random_50, routing_50)] = _random_and_routing(results, "fedavg", 50)
    routing = [*routing_25, *routing_50]
    chosen = {
        (a, b): _random_and_routing(results, a, b) for a in AGGREGATIONS for b in (25, 50, 78)
    }

    def is_behind(aggregation: str, budget: int, count: int) -> bool:
        found = chosen[aggregation, budget][:count]
        return all(random < min(others) for random, others in found)

    ahead = [random - fmean(others) for random, others in chosen["weighted", 25]]
    losses = [selective[t] - weighted[t] for t in THRESHOLDS]
    behind = [selective[t] - literal[t] for t in THRESHOLDS]
    orders = {
        max(BY_ROUTING, key=lambda r: _accuracy(results, Cell(r, b, a, t)))
        for a in AGGREGATIONS
        for b in (25, 50)
        for t in _columns(a)
    }
    whole = [
        _accuracy(results, Cell(s, 78, "fedavg", 0.0))
        - _accuracy(results, Cell("none", 100, "fedavg", 0.0))
        for s in RANKINGS
    ]
    return [
        Finding(
            f"One seed, three rounds from a start at {start:.0f} %, and a standard error of up to "
            f"{error:.1f} points a cell, so only what holds over many cells means anything. Means "
            f"are over the {len(_rows())} rows of a table."
        ),
        Finding(
            "**Averaged by examples, random choice is behind every choice by routing at 25 and 50 % "
            f"of the experts**: {random_25:.0f} and {random_50:.0f} % against {min(routing):.0f} to "
            f"{max(routing):.0f} % when everything is averaged. Selective aggregation agrees: at 50 "
            "% for each threshold, at 25 % up to threshold 1; beyond that, at 25 %, random is ahead "
            "of the mean of the others.",
            is_behind("fedavg", 25, 1)
            and is_behind("fedavg", 50, 1)
            and is_behind("selective", 50, 5)
            and is_behind("selective", 25, 3)
            and all(r > fmean(others) for r, others in chosen["selective", 25][3:]),
        ),
        Finding(
            "**With routers weighed by preference it is the other way round at 25 %**: random "
            "choice is ahead of every choice by routing at all five thresholds, by "
            f"{min(ahead):.1f} to {max(ahead):.1f} points over their mean. At 50 % it is behind "
            "their mean at all five.",
            all(random > max(others) for random, others in chosen["weighted", 25])
            and all(random < fmean(others) for random, others in chosen["weighted", 50]),
        ),
        Finding(
            "At 78 % of the experts no choice loses more than "
            f"{max(0.0, -min(whole)):.1f} points when everything is averaged.",
            -min(whole) < error,
        ),
        Finding(
            "**Between the choices by routing** (importance, information, and either half of "
            f"importance) no order holds: {', '.join(sorted(orders))} are each best in some cell.",
            len(orders) > 1,
        ),
        Finding(
            f"**Selecting at threshold 0.5 costs nothing** ({selective[0.5]:.1f} against "
            f"{plain[0.0]:.1f} %) and sends {sent[0.5]:.0f} % of the experts; at 1 it costs "
            f"{plain[0.0] - selective[1.0]:.1f} points and sends {sent[1.0]:.0f} %; at 2 it costs "
            f"{plain[0.0] - selective[2.0]:.0f} ({sent[2.0]:.0f} %), at 3.2 it costs "
            f"{plain[0.0] - selective[3.2]:.0f} ({sent[3.2]:.0f} %), where {frozen[3.2]:.0f} of the "
            "64 experts are frozen at the end.",
            selective[0.5] >= plain[0.0] > selective[1.0] > selective[2.0] > selective[3.2],
        ),
        Finding(
            "**Weighing routers by preference** costs, against the router by examples, "
            f"{_list(losses[:4])} points at thresholds 0, 0.5, 1 and 2; at 3.2 it gains "
            f"{-losses[4]:.1f}. Routers are trained themselves here.",
            min(losses[:4]) > 0 > losses[4],
        ),
        Finding(
            "**The router's equation as printed** shrinks routers to "
            f"{min(norms[t] for t in (0.0, 0.5, 1.0)):.1g} to "
            f"{max(norms[t] for t in (0.0, 0.5, 1.0)):.1g} of their norm in three rounds up to "
            f"threshold 1, to {norms[2.0]:.2g} at 2 and to {norms[3.2]:.2g} at 3.2, where only the "
            "routers of the few experts that were sent shrink. It is "
            f"{min(behind[:3]):.0f} to {max(behind[:3]):.0f} points behind selective aggregation up "
            f"to threshold 1, {_either(behind[3])} at 2, and {_either(behind[4])} at 3.2.",
            min(behind[:3]) > error and behind[4] < -error,
        ),
    ]


def _list(values: Sequence[float]) -> str:
    return f"{', '.join(f'{value:.1f}' for value in values[:-1])} and {values[-1]:.1f}"


def _either(behind: float) -> str:
    return f"{abs(behind):.1f} points {'behind' if behind > 0 else 'ahead of'} it"


def table(results: Mapping[Cell, Mapping[str, Any]]) -> str:
    """Return table.md: accuracy by aggregation, then the diagnostics of every cell that was run."""
    every = list(results.values())
    lines = [
        "# Ablation of HFedMoE",
        "",
        f"{len(results)} of {len(distinct())} distinct cells of {len(grid())}. Accuracy of the "
        "global model after the last round, %.",
    ]
    if every:
        start = fmean(result["start_accuracy"] for result in every)
        errors = [result["accuracy_stderr"] for result in every]
        peak = max(result["peak_memory_bytes"] for result in every)
        lines[-1] += (
            f" All cells start at {100 * start:.1f}; the standard error of a value is at most "
            f"{100 * max(errors):.1f} points. Peak memory of the process, over all cells: "
            f"{peak / 1e9:.2f} GB."
        )
    lines += [
        "",
        "Run once and shown once: no selection, which has no budget; a budget of 100 %, with which "
        "every ranking chooses the whole union of a batch; FedAvg, which has no threshold. "
        "Selective with threshold 0 is FedAvg: what stands there is the same run.",
    ]
    for aggregation, title in TITLES.items():
        columns = THRESHOLDS[:1] if aggregation == "fedavg" else THRESHOLDS
        heads = ["any" if aggregation == "fedavg" else f"{value:g}" for value in columns]
        lines += ["", f"## {title}", "", *head(["selection", "budget", *heads], num_words=2)]
        for selection, budget in _rows():
            cells = [Cell(selection, budget, aggregation, value) for value in columns]
            shown = [results.get(cell.representative()) for cell in cells]
            values = [f"{100 * result['accuracy']:.1f}" if result else "" for result in shown]
            lines.append(row([*_labels(selection, budget), *values]))
        means = []
        for value in columns:
            cells = [Cell(s, b, aggregation, value).representative() for s, b in _rows()]
            own = [100 * results[cell]["accuracy"] for cell in cells if cell in results]
            means.append(f"{fmean(own):.1f}" if own else "")
        lines.append(row(["mean of rows", "", *means]))
    lines += ["", "## Diagnostics", "", "Means over rounds.", "", *_diagnostics(results)]
    return "\n".join(lines) + "\n"


def _diagnostics(results: Mapping[Cell, Mapping[str, Any]]) -> Iterator[str]:
    names = [
        *("aggregation", "threshold", "selection", "budget", "accuracy, % ± standard error"),
        *("active experts, %", "pass rate, %", "pass rate by layer, %", "sum of alpha"),
        *("frozen experts at the end", "router norm, of the start", "training, s a step"),
    ]
    yield from head(names, num_words=4)
    order = list(AGGREGATIONS)
    for cell in sorted(results, key=lambda c: (order.index(c.aggregation), c.threshold)):
        result = results[cell]
        yield row(
            [
                cell.aggregation,
                "any" if cell.aggregation == "fedavg" else f"{cell.threshold:g}",
                *_labels(cell.selection, cell.budget),
                f"{100 * result['accuracy']:.1f} ± {100 * result['accuracy_stderr']:.1f}",
                f"{100 * result['active_share']:.1f}",
                f"{100 * result['pass_rate']:.1f}",
                " ".join(f"{100 * rate:.0f}" for rate in result["pass_rate_by_layer"]),
                f"{result['alpha_sum']:.4f}",
                f"{result['frozen_experts']:.0f}",
                f"{result['router_norm_ratio']:.3g}",
                f"{result['train_seconds_per_step']:.2f}",
            ]
        )


def _rows() -> list[tuple[str, int]]:
    """Return the selections and budgets that differ."""
    cells = {(cell.selection, cell.budget) for cell in distinct()}
    order = sorted(cells, key=lambda row: (SELECTIONS.index(row[0]), row[1]))
    # The row that stands for all rankings comes last.
    return sorted(order, key=lambda row: row[0] != "none" and row[1] == 100)


def _labels(selection: str, budget: int) -> tuple[str, str]:
    if selection == "none":
        return "none", "none"
    return "any ranking" if budget == 100 else selection, f"{budget} %"
