"""Run the ablation grid of HFedMoE: selection x aggregation x budget x threshold.

    python benchmarks/hfedmoe_ablation/run.py --model MODEL --data AG_NEWS.jsonl [--shard 0/2]
        [--limit N]
    python benchmarks/hfedmoe_ablation/run.py --table

All cells start from the same global tree, of a few rounds of FedAvg, and share data and model in
one process. A cell's result goes to results/ here, and a cell that has one is skipped; table.md is
written from those files alone. Cells that are the same by construction are run once; see ``Cell``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from orchard.engine.progress import Silent
from orchard.engine.simulator import simulate
from orchard.experiment.budgets import expert_budgets
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import Experiment, prepare_experiment
from orchard.experiment.running import (
    build_clients,
    build_schedule,
    load_model,
    run_experiment,
)
from orchard.experiment.wiring import build_channel
from orchard.models.stored.loading import threads
from orchard.models.trainable.adapters import AdaptedModel
from orchard.process_memory import peak_memory_bytes
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog, write_json
from orchard.seeding import Seeds
from orchard.server.checkpoint import ServerState, load_checkpoint
from orchard.strategies.expert_names import is_router
from orchard.trees import Tree, digest

HERE = Path(__file__).parent
BASE_RECIPE = HERE.parent.parent / "recipes" / "ag_news" / "_base.toml"

RANKINGS = ("random", "importance", "information", "cumulative", "specific")
SELECTIONS = ("none", *RANKINGS)
BUDGETS = (25, 50, 78, 100)  # % of all experts
THRESHOLDS = (0.0, 0.5, 1.0, 2.0, 3.2)  # in units of 1/E
AGGREGATIONS = {
    "fedavg": ("all", "examples"),
    "selective": ("usage", "examples"),
    "weighted": ("usage", "preference"),
    "literal": ("usage", "literal"),
}
"""Name to ``selection.experts`` and ``selection.router``."""
TITLES = {
    "fedavg": "FedAvg: all experts are sent, everything counts by examples",
    "selective": "Selective: experts by usage, the router by examples",
    "weighted": "Selective, weighted router: experts by usage, the router by preference",
    "literal": "Literal: experts by usage, the router by Eq. 21 as printed",
}

SETTINGS = (
    # The literal aggregation shrinks what is sent of a router: itself, not an adapter on it.
    "model.lora_targets=q_proj,k_proj,v_proj,o_proj,experts",
    "model.full_targets=router",
    "strategy.name=hfedmoe",
    "evaluation.models=global",
    "data.test_per_category=75",
)
WARM_START = (
    *("selection.rank_by=none", "selection.experts=all", "selection.router=examples"),
    *("server.rounds=10", "client.schedule=constant"),
)
CELL = ("server.rounds=3", "client.steps=2")


@dataclass(frozen=True, order=True)
class Cell:
    """One cell of the grid.

    Attributes:
        selection: Of ``SELECTIONS``.
        budget: % of all experts, the same for every client.
        aggregation: Of ``AGGREGATIONS``.
        threshold: Usage from which an expert is sent, in units of 1/E.
    """

    selection: str
    budget: int
    aggregation: str
    threshold: float

    @property
    def name(self) -> str:
        """What its result is called."""
        return f"{self.selection}-{self.budget}-{self.aggregation}-{self.threshold:g}"

    def representative(self) -> Cell:
        """Return the cell that is run for this one.

        Without a selection there is no budget; a budget of 100 % holds the whole union of a batch
        however it is ranked; FedAvg knows no threshold, and one of 0 sends everything, which with
        routers by examples is FedAvg.
        """
        same = self
        if same.selection == "none":
            same = replace(same, budget=100)
        elif same.budget == 100:
            same = replace(same, selection="information")
        if same.aggregation == "fedavg" or (
            same.aggregation == "selective" and same.threshold == 0
        ):
            same = replace(same, aggregation="fedavg", threshold=0.0)
        return same

    def overrides(self) -> tuple[str, ...]:
        """Return the cell as settings of a recipe."""
        experts, router = AGGREGATIONS[self.aggregation]
        return (
            f"selection.rank_by={self.selection}",
            f"selection.threshold={self.threshold}",
            f"selection.experts={experts}",
            f"selection.router={router}",
            f"client.budget={self.budget}%",
        )


def grid() -> list[Cell]:
    """Return every cell, those first that say most, so that an unfinished grid can be read."""
    by_threshold = sorted(THRESHOLDS, key=lambda value: abs(value - 1))
    return [
        Cell(selection, budget, aggregation, threshold)
        for threshold, aggregation, budget, selection in itertools.product(
            by_threshold, AGGREGATIONS, BUDGETS, SELECTIONS
        )
    ]


def distinct() -> list[Cell]:
    """Return the cells that have to be run, in the order of ``grid``."""
    return list(dict.fromkeys(cell.representative() for cell in grid()))


class Runner:
    """Data, model and warm start of all cells of one process."""

    def __init__(
        self, *, model: str, data: str, folder: Path, settings: Sequence[str] = ()
    ) -> None:
        """Load everything and train the warm start, or read it where ``folder`` has it.

        Args:
            model: Of ``model.path``.
            data: Of ``data.path``.
            folder: Of the run that is the warm start.
            settings: More settings of all recipes, warm start included; for tests.
        """
        self._common = (f"model.path={model}", f"data.path={data}", *SETTINGS)
        self._last = tuple(settings)
        self.experiment: Experiment = prepare_experiment(self.recipe(WARM_START))
        self.model: AdaptedModel = load_model(self.experiment.recipe, self.experiment.tokenizer)
        result = run_experiment(self.experiment, folder=folder, reporter=Silent(), model=self.model)
        about = json.loads(next((folder / "checkpoints").glob("*/state.json")).read_text())["about"]
        state = load_checkpoint(folder / "checkpoints", about=about)
        assert state is not None, "a run has a checkpoint"
        self.start: Tree = state.shared
        self.accuracy: float = result["summary"]["global"]["accuracy"]["mean"]

    def recipe(self, overrides: Sequence[str]) -> Recipe:
        """Return the recipe of the grid with other settings."""
        return read_recipe(BASE_RECIPE, [*self._common, *overrides, *self._last]).recipe

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run one cell and return what the table needs."""
        recipe = self.recipe((*CELL, *cell.overrides()))
        clients = list(self.experiment.federation.train)
        budgets = expert_budgets(recipe, self.model.view, num_clients=len(clients))
        experiment = replace(
            self.experiment, recipe=recipe, budgets=dict(zip(clients, budgets, strict=True))
        )
        with (
            tempfile.TemporaryDirectory() as folder,
            threads(recipe.model.num_threads),
        ):
            state = simulate(
                build_strategy(recipe, num_clients=len(clients)),
                build_clients(experiment, self.model, Path(folder) / "clients"),
                ServerState(0, self.start),
                schedule=build_schedule(recipe),
                channel=build_channel(recipe),
                seeds=Seeds(recipe.seed),
                folder=Path(folder),
                about={},
                reporter=Silent(),
                title=cell.name,
            )
            lines = MetricsLog(Path(folder) / "metrics.jsonl").read()
        return {
            **asdict(cell),
            "start_accuracy": self.accuracy,
            **summarize(lines, num_steps=recipe.client.steps),
            "router_norm_ratio": router_norm(state.shared) / router_norm(self.start),
            "peak_memory_bytes": peak_memory_bytes(),
            "shared_digest": digest(state.shared),
        }


def router_norm(tree: Tree) -> float:
    """Return the L2 norm of all routers together."""
    return math.hypot(*(float(tree[name].norm()) for name in tree if is_router(name)))


def summarize(lines: Sequence[Mapping[str, Any]], *, num_steps: int) -> dict[str, Any]:
    """Return final accuracy and diagnostics of a run's log, means over its rounds.

    Args:
        lines: The log.
        num_steps: Optimizer steps of a client in a round.
    """
    rounds = [line for line in lines if line["kind"] == "round"]
    final = next(line for line in reversed(lines) if line["kind"] == "evaluation")
    values = next(iter(final["clients"].values()))
    layers = [name for name in rounds[0] if name.startswith("experts/pass_rate_")]
    steps = num_steps * sum(line["round/num_clients"] for line in rounds)
    return {
        "accuracy": values["global/accuracy"],
        "accuracy_stderr": values["global/accuracy_stderr"],
        "active_share": fmean(line["experts/active_share"] for line in rounds),
        "pass_rate": fmean(line["experts/pass_rate"] for line in rounds),
        "pass_rate_by_layer": [fmean(line[name] for line in rounds) for name in layers],
        "alpha_sum": fmean(line["experts/alpha_sum"] for line in rounds),
        "frozen_experts": rounds[-1]["experts/frozen"],
        "train_loss": rounds[-1]["round/train_loss"],
        "train_seconds_per_step": math.fsum(line["round/train_seconds"] for line in rounds) / steps,
        "seconds": math.fsum(line["round/seconds"] for line in rounds),
    }


def in_shard(cells: Sequence[Cell], shard: str) -> list[Cell]:
    """Return the cells of shard ``i/n``, i from 0.

    Raises:
        ValueError: It is no such shard.
    """
    first, _, number = shard.partition("/")
    if not (first.isdigit() and number.isdigit() and int(first) < int(number)):
        raise ValueError(f"--shard must be i/n with i in 0..n-1, got {shard}; for example 0/2")
    return list(cells[int(first) :: int(number)])


def read_results(folder: Path) -> dict[Cell, dict[str, Any]]:
    """Return the results that are there."""
    found = {cell: folder / f"{cell.name}.json" for cell in distinct()}
    return {cell: json.loads(path.read_text()) for cell, path in found.items() if path.exists()}


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
        lines += ["", f"## {title}", "", *_head(["selection", "budget", *heads])]
        for selection, budget in _rows():
            cells = [Cell(selection, budget, aggregation, value) for value in columns]
            shown = [results.get(cell.representative()) for cell in cells]
            values = [f"{100 * result['accuracy']:.1f}" if result else "" for result in shown]
            lines.append(_row([*_labels(selection, budget), *values]))
        means = []
        for value in columns:
            cells = [Cell(s, b, aggregation, value).representative() for s, b in _rows()]
            own = [100 * results[cell]["accuracy"] for cell in cells if cell in results]
            means.append(f"{fmean(own):.1f}" if own else "")
        lines.append(_row(["mean of rows", "", *means]))
    lines += ["", "## Diagnostics", "", "Means over rounds.", "", *_diagnostics(results)]
    return "\n".join(lines) + "\n"


def _diagnostics(results: Mapping[Cell, Mapping[str, Any]]) -> Iterator[str]:
    names = [
        *("aggregation", "threshold", "selection", "budget", "accuracy, % ± standard error"),
        *("active experts, %", "pass rate, %", "pass rate by layer, %", "sum of alpha"),
        *("frozen experts at the end", "router norm, of the start", "training, s a step"),
    ]
    yield from _head(names, num_words=4)
    order = list(AGGREGATIONS)
    for cell in sorted(results, key=lambda c: (order.index(c.aggregation), c.threshold)):
        result = results[cell]
        yield _row(
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


def _head(names: Sequence[str], *, num_words: int = 2) -> list[str]:
    rule = ["---"] * num_words + ["---:"] * (len(names) - num_words)
    return [_row(names), _row(rule)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what has no result yet, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--shard", default="0/1", help="part of the cells: 0/2 and 1/2 make all")
    parser.add_argument("--limit", type=int, help="run at most so many cells")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    results = HERE / "results"
    if not arguments.table:
        own = in_shard(distinct(), arguments.shard)
        pending = [c for c in own if not (results / f"{c.name}.json").exists()][: arguments.limit]
        shard = arguments.shard.replace("/", "-of-")
        runner = Runner(
            model=arguments.model,
            data=arguments.data,
            folder=Path("runs") / "hfedmoe_ablation" / shard,
        )
        for position, cell in enumerate(pending, 1):
            result = runner.run(cell)
            write_json(results / f"{cell.name}.json", result)
            print(
                f"{position}/{len(pending)} {cell.name}: accuracy {100 * result['accuracy']:.1f}, "
                f"{result['seconds']:.1f} s",
                flush=True,
            )
    (HERE / "table.md").write_text(table(read_results(results)))


if __name__ == "__main__":
    main()
