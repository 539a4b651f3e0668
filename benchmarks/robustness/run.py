"""Let 4 of 20 clients send scaled or sign-flipped updates, and aggregate in five ways.

    python benchmarks/robustness/run.py --model MODEL --data AG_NEWS.jsonl [--seeds 0 1 2]
    python benchmarks/robustness/run.py --table

Each run is FedAvg on AG News, 20 clients of equal shares, and its record is kept in results/; a
run whose record is there is not run again. table.md and figure.png are written from the records.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.engine.progress import Silent
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import load_model, run_experiment
from orchard.extras import require
from orchard.models.trainable.adapters import AdaptedModel
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog
from orchard.strategies.strategy import Contribution, Strategy, Trained

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "recipes" / "ag_news" / "fedavg.toml"
NUM_CLIENTS, NUM_HOSTILE = 20, 4
OPTIONS = (
    "data.partition=iid",
    f"data.num_clients={NUM_CLIENTS}",
    "data.test_per_category=75",
    "model.lora_targets=q_proj,k_proj,v_proj,o_proj",
    "client.steps=2",
    "server.rounds=12",
    "evaluation.every=2",
    "evaluation.models=global",
    "evaluation.metrics=loss,accuracy",
)
KERNELS = ("mean", "median", "trimmed_mean", "clipped_mean", "krum")
Attack = Callable[[torch.Tensor], torch.Tensor]
ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "scaled": lambda tensor: 20.0 * tensor,
    "flipped": lambda tensor: -5.0 * tensor,
}


def hostile(strategy: Strategy, attack: Attack | None) -> Strategy:
    """Return the strategy whose first clients send something else than they trained."""

    def weigh(client: Client, task: Task, trained: Trained) -> Contribution:
        sent = strategy.weigh(client, task, trained)
        number = int(client.client_id.rpartition("_")[2])
        if attack is None or number >= NUM_HOSTILE:
            return sent
        return replace(sent, delta={name: attack(tensor) for name, tensor in sent.delta.items()})

    return replace(strategy, weigh=weigh)


def run(recipe: Recipe, attack: str, model: AdaptedModel | None) -> dict[str, Any]:
    """Run one recipe under one attack, and return its curves."""
    experiment = prepare_experiment(recipe)
    ids = sorted(int(name.rpartition("_")[2]) for name in experiment.train)
    assert ids == list(range(NUM_CLIENTS)), ids
    strategy = hostile(build_strategy(recipe, num_clients=NUM_CLIENTS), ATTACKS[attack])
    with tempfile.TemporaryDirectory() as folder:
        run_experiment(
            experiment, folder=Path(folder), reporter=Silent(), model=model, strategy=strategy
        )
        lines = MetricsLog(Path(folder) / "metrics.jsonl").read()
    curves: dict[str, list[float]] = {"loss": [], "accuracy": []}
    for line in lines:
        if line["kind"] == "evaluation":
            values = next(iter(line["clients"].values()))
            for metric, curve in curves.items():
                curve.append(values[f"global/{metric}"])
    return curves


def records() -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the records that are here, by kernel, attack and seed."""
    found = {}
    for path in sorted((HERE / "results").glob("*.json")):
        record = json.loads(path.read_text())
        found[record["kernel"], record["attack"], record["seed"]] = record
    return found


def write_table() -> None:
    """Write table.md and figure.png."""
    found = records()
    lines = [
        "| attack | kernel | seeds | final accuracy, % | final loss (spread) | loss by seed |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for attack in ATTACKS:
        for kernel in KERNELS:
            runs = [r for (k, a, _), r in found.items() if (k, a) == (kernel, attack)]
            if not runs:
                continue
            finals = {m: [r[m][-1] for r in runs] for m in ("accuracy", "loss")}
            accuracy = _spread([100 * value for value in finals["accuracy"]], 1)
            each = " ".join(f"{value:.3f}" for value in finals["loss"])
            row = (attack, kernel, len(runs), accuracy, _spread(finals["loss"], 3), each)
            lines.append(f"| {' | '.join(map(str, row))} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    _draw(found)


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def _draw(found: dict[tuple[str, str, int], dict[str, Any]]) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(ATTACKS), figsize=(11, 3.4), sharey=True)
    for panel, attack in zip(panels, ATTACKS, strict=True):
        for color, kernel in enumerate(KERNELS):
            runs = [r["accuracy"] for (k, a, _), r in found.items() if (k, a) == (kernel, attack)]
            for number, curve in enumerate(runs):
                rounds = [2 * (index + 1) for index in range(len(curve))]
                panel.plot(
                    rounds,
                    [100 * value for value in curve],
                    color=f"C{color}",
                    label=kernel.replace("_", " ") if number == 0 else None,
                    linewidth=1.3,
                )
        hostile_clients = f"{NUM_HOSTILE} of {NUM_CLIENTS} clients {attack}"
        panel.set_title("no attack" if attack == "none" else hostile_clients)
        panel.set_xlabel("round")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(HERE / "figure.png", dpi=130)


def main() -> None:
    """Run what is missing, then write table and figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    try:
        require("report", to="draw curves")
    except ValueError as error:
        sys.exit(f"error: {error}")
    (HERE / "results").mkdir(exist_ok=True)
    for seed in () if given.table else given.seeds:
        model = None
        for attack in ATTACKS:
            for kernel in KERNELS:
                if (kernel, attack, seed) in records():
                    continue
                options = [
                    *OPTIONS,
                    f"model.path={given.model}",
                    f"data.path={given.data}",
                    f"seed={seed}",
                    f"server.aggregation={kernel}",
                ]
                recipe = read_recipe(RECIPE, options).recipe
                if model is None:
                    model = load_model(recipe, prepare_experiment(recipe).tokenizer)
                curves = run(recipe, attack, model)
                record = {"kernel": kernel, "attack": attack, "seed": seed, **curves}
                path = HERE / "results" / f"{attack}-{kernel}-{seed}.json"
                path.write_text(json.dumps(record, indent=1) + "\n")
                print(f"{attack} {kernel} {seed}: {curves['accuracy'][-1]:.3f}", flush=True)
    write_table()


if __name__ == "__main__":
    main()
