"""A small federation of the packaged model that attacks look at, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.privacy.attacks import Reals
from orchard.client.client import Client
from orchard.client.scores import read_scores
from orchard.communication.messages import Update
from orchard.data.examples import Example
from orchard.engine.simulator import sample_clients
from orchard.evaluation.quality import EvaluationSettings
from orchard.experiment.encoding import encode_test, make_wording
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import Experiment, prepare_experiment
from orchard.experiment.protecting import build_protection
from orchard.experiment.running import build_clients, build_schedule, load_model
from orchard.recipe.reading import read_recipe
from orchard.seeding import Seeds
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import (
    evaluate_client,
    start_server,
    train_client,
    update_server,
)

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
COMMON = (
    *("data.test_size=1.0", "data.category=category", "evaluation.retention_path="),
    *("client.schedule=constant", "server.weighting=uniform"),
)


class Federation:
    """Clients of files of rows, under one method with one protection."""

    def __init__(self, data: Path, folder: Path, *, method: str, options: Sequence[str]) -> None:
        """Load the model.

        Args:
            data: Folder of a file for each client.
            folder: For what clients keep.
            method: Of ``recipes/tiny``.
            options: Overrides.
        """
        overrides = [*COMMON, f"data.path={data}", *options]
        self.recipe = read_recipe(RECIPES / f"{method}.toml", overrides).recipe
        self.experiment: Experiment = prepare_experiment(self.recipe)
        self.model = load_model(self.recipe, self.experiment.tokenizer)
        self.clients: list[Client] = build_clients(self.experiment, self.model, folder)
        strategy = build_strategy(self.recipe, num_clients=len(self.clients))
        sizes = {client.client_id: client.num_examples for client in self.clients}
        self.strategy = replace(strategy, protection=build_protection(self.recipe, sizes))
        self.schedule = build_schedule(self.recipe)
        self.state: ServerState = start_server(self.strategy, self.model.fresh)

    def updates(self) -> list[Update]:
        """Return what all clients send in the coming round."""
        task = self.schedule.task(self.state.round_number + 1, self.state.shared)
        return [train_client(self.strategy, client, task) for client in self.clients]

    def run(self) -> None:
        """Run all rounds, with the cohorts that the recipe draws."""
        for number in range(1, self.recipe.server.rounds + 1):
            task = self.schedule.task(number, self.state.shared)
            cohort = sample_clients(self.clients, self.schedule, Seeds(self.recipe.seed), number)
            sent = [train_client(self.strategy, client, task) for client in cohort]
            self.state = update_server(self.strategy, self.state, sent)

    def measure(
        self, rows: Sequence[Example], *, whose: str, metrics: Sequence[str] = ("loss",)
    ) -> dict[str, dict[str, Any]]:
        """Return each model's metrics on rows, and under ``each`` the mean loss of every row.

        Args:
            rows: What is measured.
            whose: The client whose personal model is looked at.
            metrics: As ``evaluation.metrics``.
        """
        client = next(c for c in self.clients if c.client_id == whose)
        wording = make_wording(self.recipe, self.experiment.tokenizer)
        test = encode_test(rows, wording, max_tokens=64, whose="attack")
        settings = EvaluationSettings(
            tuple(metrics), 12, 160, keeps_answers=True, end_ids=self.experiment.end_ids
        )
        reader = replace(client, test=test, retention=(), evaluation=settings)
        number = self.state.round_number
        task = self.schedule.task(number + 1, self.state.shared)
        names = ("base", "global", "personal")
        values = evaluate_client(self.strategy, reader, task, names)
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            scores = read_scores(client.store.folder, round_number=number, model=name)
            if scores is None:  # who keeps nothing has the global model
                found[name] = found["global"]
                continue
            sums, counts = scores["loss"], scores["num_tokens"]
            found[name] = {m: values[f"{name}/{m}"] for m in metrics}
            found[name]["each"] = [s / n for s, n in zip(sums, counts, strict=True)]
        return found


def as_vectors(updates: Sequence[Update], shared: Mapping[str, Any]) -> Reals:
    """Return updates as one vector each over all global names, zeros where nothing was sent."""
    names = sorted(shared)
    return np.stack(
        [
            np.concatenate(
                [
                    u.delta[name].double().numpy().ravel()
                    if name in u.delta
                    else np.zeros(shared[name].numel())
                    for name in names
                ]
            )
            for u in updates
        ]
    )


def as_names(updates: Sequence[Update], shared: Mapping[str, Any]) -> Reals:
    """Return for each update which of the global names it has."""
    names = sorted(shared)
    return np.array([[1.0 if name in u.delta else 0.0 for name in names] for u in updates])
