"""Run the ablation grid of HFedMoE: selection x aggregation x budget x threshold.

    python -m benchmarks.hfedmoe_ablation.run --model MODEL --data AG_NEWS.jsonl [--shard 0/2]
        [--limit N]
    python -m benchmarks.hfedmoe_ablation.run --table

All cells start from the same global tree, of a few rounds of FedAvg, and share data and model in
one process. A cell's result goes to results/ here, and a cell that has one is skipped; table.md and
the page are written from those files alone. Cells that are the same by construction are run once;
see ``Cell``.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.hfedmoe_ablation.grid import Cell, distinct
from benchmarks.hfedmoe_ablation.report import HERE, page
from benchmarks.running import arguments_of
from orchard.engine.progress import Silent
from orchard.engine.simulator import run_rounds
from orchard.engine.turns import Alone
from orchard.experiment.budgets import expert_budgets
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import Experiment, prepare_experiment
from orchard.experiment.run_folder import recipe_digest
from orchard.experiment.running import build_clients, build_schedule, load_model, run_experiment
from orchard.experiment.wiring import build_channel
from orchard.models.stored.loading import threads
from orchard.models.trainable.adapters import AdaptedModel
from orchard.process_memory import peak_memory_bytes
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog, environment, write_json
from orchard.seeding import Seeds
from orchard.server.checkpoint import ServerState, load_checkpoint
from orchard.strategies.expert_names import is_router
from orchard.trees import Tree, digest

BASE_RECIPE = HERE.parent.parent / "recipes" / "ag_news" / "_base.toml"

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
            strategy = build_strategy(recipe, num_clients=len(clients))
            channel = build_channel(recipe)
            own = build_clients(experiment, self.model, Path(folder) / "clients")
            state = run_rounds(
                strategy,
                Alone(strategy, own, channel),
                ServerState(0, self.start),
                schedule=build_schedule(recipe),
                channel=channel,
                seeds=Seeds(recipe.seed),
                folder=Path(folder),
                about={},
                reporter=Silent(),
                title=cell.name,
            )
            lines = MetricsLog(Path(folder) / "metrics.jsonl").read()
        return {
            **environment(),
            "recipe_digest": recipe_digest(recipe),
            "data_digest": experiment.digest.overall,
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


def main() -> None:
    """Run what has no result yet, then write the page."""
    parser = arguments_of(__doc__)
    parser.add_argument("--shard", default="0/1", help="part of the cells: 0/2 and 1/2 make all")
    parser.add_argument("--limit", type=int, help="run at most so many cells")
    given = parser.parse_args()
    if not given.table:
        _run_pending(given.shard, given.limit, model=given.model, data=given.data)
    page().write()


def _run_pending(shard: str, limit: int | None, *, model: str, data: str) -> None:
    """Run the cells of a shard that have no result, at most so many."""
    results = HERE / "results"
    own = in_shard(distinct(), shard)
    pending = [c for c in own if not (results / f"{c.name}.json").exists()][:limit]
    folder = Path("runs") / "hfedmoe_ablation" / shard.replace("/", "-of-")
    runner = Runner(model=model, data=data, folder=folder)
    for position, cell in enumerate(pending, 1):
        result = runner.run(cell)
        write_json(results / f"{cell.name}.json", result)
        print(
            f"{position}/{len(pending)} {cell.name}: accuracy {100 * result['accuracy']:.1f}, "
            f"{result['seconds']:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
