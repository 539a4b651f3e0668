"""Let 4 of 20 clients send scaled or sign-flipped updates, and aggregate in five ways.

    python -m benchmarks.robustness.run --model MODEL --data AG_NEWS.jsonl [--seeds 0 1 2]
    python -m benchmarks.robustness.run --table

Each run is FedAvg on AG News, 20 clients of equal shares, and its record is kept in results/; a
run whose record is there is not run again. Page, table.md and figure.png are written from the
records.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import keep, origin
from benchmarks.robustness.report import (
    ATTACKS,
    HERE,
    KERNELS,
    NUM_CLIENTS,
    NUM_HOSTILE,
    draw,
    page,
    records,
)
from benchmarks.running import arguments_of
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

RECIPE = HERE.parents[1] / "recipes" / "ag_news" / "fedavg.toml"
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
Attack = Callable[[torch.Tensor], torch.Tensor]
CHANGES: dict[str, Attack | None] = {
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
    """Run one recipe under one attack, and return its curves and their origin."""
    experiment = prepare_experiment(recipe)
    ids = sorted(int(name.rpartition("_")[2]) for name in experiment.train)
    assert ids == list(range(NUM_CLIENTS)), ids
    strategy = hostile(build_strategy(recipe, num_clients=NUM_CLIENTS), CHANGES[attack])
    with tempfile.TemporaryDirectory() as folder:
        result = run_experiment(
            experiment, folder=Path(folder), reporter=Silent(), model=model, strategy=strategy
        )
        lines = MetricsLog(Path(folder) / "metrics.jsonl").read()
    curves: dict[str, list[float]] = {"loss": [], "accuracy": []}
    for line in lines:
        if line["kind"] == "evaluation":
            values = next(iter(line["clients"].values()))
            for metric, curve in curves.items():
                curve.append(values[f"global/{metric}"])
    return {**origin(result), **curves}


def main() -> None:
    """Run what is missing, then write page and figure."""
    given = arguments_of(__doc__, seeds=(0, 1, 2)).parse_args()
    try:
        require("report", to="draw curves")
    except ValueError as error:
        sys.exit(f"error: {error}")
    for seed in () if given.table else given.seeds:
        _run_seed(seed, model_path=given.model, data_path=given.data)
    page().write()
    draw()


def _run_seed(seed: int, *, model_path: str, data_path: str) -> None:
    """Run what has no record of one seed; the model is loaded once."""
    model = None
    for attack, kernel in itertools.product(ATTACKS, KERNELS):
        if (kernel, attack, seed) in records():
            continue
        options = [
            *OPTIONS,
            f"model.path={model_path}",
            f"data.path={data_path}",
            f"seed={seed}",
            f"server.aggregation={kernel}",
        ]
        recipe = read_recipe(RECIPE, options).recipe
        if model is None:
            model = load_model(recipe, prepare_experiment(recipe).tokenizer)
        found = run(recipe, attack, model)
        record = {"kernel": kernel, "attack": attack, "seed": seed, **found}
        keep(HERE / "results" / f"{attack}-{kernel}-{seed}.json", record)
        print(f"{attack} {kernel} {seed}: {found['accuracy'][-1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
