"""A recipe becomes objects, here and in ``methods``, and nowhere else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchard.budgets import expert_budgets
from orchard.channels import build_channel, check_communication
from orchard.client.client import Client
from orchard.client.store import ClientStore
from orchard.client.training import TrainingSettings
from orchard.data.examples import Example
from orchard.data.templates import Encoded, Template, encode, encode_options
from orchard.engine.progress import Reporter
from orchard.engine.simulator import Schedule, simulate
from orchard.evaluation.quality import EvaluationSettings, TestExample, check_options
from orchard.experts.submodel import SubmodelSource
from orchard.federation import (
    Federation,
    build_federation,
    build_site,
    read_calibration,
    read_retention,
)
from orchard.methods import (
    build_strategy,
    check_aggregation,
    check_strategy,
    lora_settings,
    require_path,
)
from orchard.models.adapters import AdaptedModel
from orchard.models.loading import (
    check_device,
    check_model,
    load_base,
    load_tokenizer,
    threads,
)
from orchard.recipe.options import DeploymentOptions, Recipe
from orchard.recipe.reading import (
    format_value,
    known_options,
    option_value,
    read_recipe,
    to_toml,
    words,
)
from orchard.reports import build_result
from orchard.results import environment, write_atomically, write_json
from orchard.seeding import Seeds
from orchard.strategies.strategy import Strategy, start_server
from orchard.trees import digest

RECIPE_FILE = "recipe.toml"


@dataclass(frozen=True)
class Experiment:
    """A checked recipe with its data, before any model is loaded.

    Attributes:
        recipe: Every choice.
        federation: Who holds which examples.
        train: Client id to encoded training examples.
        test: Client id to encoded held-out examples; with a central test set, all the same list.
        retention: Encoded examples of what the base knew before.
        calibration: Encoded calibration corpus.
        tokenizer: The model's.
        budgets: Client id to the experts that it can afford, over all MoE layers; None = all.
    """

    recipe: Recipe
    federation: Federation
    train: Mapping[str, list[Encoded]]
    test: Mapping[str, list[TestExample]]
    retention: list[TestExample]
    calibration: list[Encoded]
    tokenizer: Any
    budgets: Mapping[str, int | None]


@dataclass(frozen=True)
class Seat:
    """One client's place in a federation whose other clients are elsewhere.

    Attributes:
        client_id: Its name.
        index: Its place among all clients, from 0.
        num_clients: How many there are.
    """

    client_id: str
    index: int
    num_clients: int


def prepare_experiment(recipe: Recipe, *, seat: Seat | None = None) -> Experiment:
    """Check a recipe against its data and model, without loading the model's weights.

    Args:
        recipe: Every choice.
        seat: Whose data ``data.path`` is, where it is one client's file; None = all clients'.

    Raises:
        FileNotFoundError: Data or model are not there.
        ValueError: Something does not fit.
    """
    check_strategy(recipe.strategy.name)
    require_path(recipe)
    check_communication(recipe)
    federation = build_site(recipe, seat.client_id) if seat else build_federation(recipe)
    num_clients = seat.num_clients if seat else len(federation.train)
    if seat is None:
        check_aggregation(recipe, num_clients=num_clients)
    if recipe.server.clients_per_round > num_clients:
        raise ValueError(
            f"server.clients_per_round must be in 0..{num_clients}, got "
            f"{recipe.server.clients_per_round}; there are {num_clients} clients"
        )
    retention, calibration = read_retention(recipe), read_calibration(recipe)
    if "accuracy" in words(recipe.evaluation.metrics):
        held_out = [
            example.options for examples in federation.test.values() for example in examples
        ]
        check_options(held_out, whose="the test examples of data.path")
        check_options(
            [example.options for example in retention],
            whose="the examples of evaluation.retention_path",
        )
    check_device(recipe.model.device)
    view = check_model(recipe.model.path, lora_settings(recipe))
    budgets = expert_budgets(recipe, view, num_clients=num_clients)
    if seat:
        budgets = budgets[seat.index : seat.index + 1]
    tokenizer = load_tokenizer(recipe.model.path)

    data = recipe.data
    template: Template = data.template  # type: ignore[assignment]

    def encode_all(examples: Sequence[Example]) -> list[Encoded]:
        return [
            encode(example, template, tokenizer, max_tokens=data.max_tokens) for example in examples
        ]

    def encode_test(examples: Sequence[Example]) -> list[TestExample]:
        return [
            TestExample(
                encoded,
                example.response.strip(),
                options=encode_options(example, template, tokenizer, max_tokens=data.max_tokens),
                answer=example.options.index(example.response) if example.options else 0,
            )
            for encoded, example in zip(encode_all(examples), examples, strict=True)
        ]

    if federation.has_central_test:
        test = dict.fromkeys(federation.test, encode_test(next(iter(federation.test.values()))))
    else:
        test = {client: encode_test(examples) for client, examples in federation.test.items()}
    return Experiment(
        recipe=recipe,
        federation=federation,
        train={client: encode_all(examples) for client, examples in federation.train.items()},
        test=test,
        retention=encode_test(retention),
        calibration=encode_all(calibration),
        tokenizer=tokenizer,
        budgets=dict(zip(federation.train, budgets, strict=True)),
    )


def check_folder(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Check that a run of ``recipe`` may be written to ``folder``.

    Raises:
        ValueError: The folder holds a run, and ``resume`` is not set or the recipe is another.
    """
    if not (folder / RECIPE_FILE).exists():
        return
    if not resume:
        raise ValueError(
            f"--out must be a new folder, got {folder}, which holds a run; "
            "add --resume to continue it, or choose another"
        )
    before = read_recipe(folder / RECIPE_FILE).recipe
    for key in known_options():
        if key.startswith("deployment."):  # how long to wait may change between two starts
            continue
        old, new = option_value(before, key), option_value(recipe, key)
        if old != new:
            raise ValueError(
                f"{key} must be {format_value(old)} to resume the run in {folder}, got "
                f"{format_value(new)}; use the same recipe, or another --out"
            )


def data_notes(experiment: Experiment) -> list[str]:
    """Return what a person should know about the data before trusting a result."""
    limit = experiment.recipe.data.max_tokens
    truncated = count_truncated(experiment)
    notes = experiment.federation.notes()
    if truncated:
        total = sum(len(examples) for examples in experiment.train.values())
        notes.append(f"{truncated} of {total} training examples were cut to {limit} tokens")
    return notes


def count_truncated(experiment: Experiment) -> int:
    """Return how many training examples were cut to ``data.max_tokens``."""
    return sum(e.is_truncated for examples in experiment.train.values() for e in examples)


def load_model(recipe: Recipe, tokenizer: Any) -> AdaptedModel:
    """Load the base and put fresh adapters on it.

    Raises:
        ValueError: Adapters do not fit.
    """
    options = recipe.model
    base = load_base(options.path, dtype=options.dtype, device=options.device)
    return AdaptedModel(
        base.view,
        lora_settings(recipe),
        tokenizer=tokenizer,
        base_digest=base.digest,
        seed=Seeds(recipe.seed).integer("adapters"),
    )


def build_clients(experiment: Experiment, model: AdaptedModel, folder: Path) -> list[Client]:
    """Return all clients of an experiment, sharing one model, each with its own store.

    Args:
        experiment: The data.
        model: The shared model.
        folder: Client stores live in a folder each below it.
    """
    recipe = experiment.recipe
    training = TrainingSettings(
        batch_size=recipe.client.batch_size,
        grad_accumulation=recipe.client.grad_accumulation,
        optimizer=recipe.client.optimizer,
        weight_decay=recipe.client.weight_decay,
        max_grad_norm=recipe.client.max_grad_norm,
        router_aux_coefficient=recipe.client.router_aux_coefficient,
        packed=recipe.client.packing,
        pass_tokens=recipe.client.pass_tokens,
    )
    evaluation = EvaluationSettings(
        metrics=words(recipe.evaluation.metrics),
        max_new_tokens=recipe.evaluation.max_new_tokens,
        batch_size=recipe.evaluation.batch_size,
        length_normalization=recipe.evaluation.length_normalization,  # type: ignore[arg-type]
    )
    submodels = SubmodelSource(
        path=recipe.model.path,
        dtype=recipe.model.dtype,
        device=recipe.model.device,
        lora=lora_settings(recipe),
        tokenizer=experiment.tokenizer,
        base_digest=model.base_digest,
        seed=Seeds(recipe.seed).integer("adapters"),
    )
    return [
        Client(
            client_id=client_id,
            model=model,
            train=experiment.train[client_id],
            categories=[example.category for example in examples],
            test=experiment.test[client_id],
            retention=experiment.retention,
            calibration_corpus=experiment.calibration,
            store=ClientStore(folder / folder_name(client_id), model.base_digest),
            training=training,
            evaluation=evaluation,
            seeds=Seeds(recipe.seed),
            budget_experts=experiment.budgets[client_id],
            submodels=submodels,
        )
        for client_id, examples in experiment.federation.train.items()
    ]


def folder_name(client_id: str) -> str:
    """Return a file name for any client id: letters, digits, ``_`` and ``-`` stay as they are."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda match: f"%{ord(match[0]):02x}", client_id)


def build_schedule(recipe: Recipe) -> Schedule:
    """Return what happens in which round."""
    client, server, evaluation = recipe.client, recipe.server, recipe.evaluation
    return Schedule(
        num_rounds=server.rounds,
        clients_per_round=server.clients_per_round,
        steps=client.steps,
        epochs=client.epochs,
        lr=client.lr,
        lr_min=client.lr_min,
        is_cosine=client.schedule == "cosine",
        evaluate_every=evaluation.every,
        models=words(evaluation.models),
    )


def run_experiment(
    experiment: Experiment,
    *,
    folder: Path,
    reporter: Reporter,
    model: AdaptedModel | None = None,
    strategy: Strategy | None = None,
) -> dict[str, Any]:
    """Run, or go on running, an experiment in ``folder``, and write its result there.

    Args:
        experiment: The checked recipe and its data.
        folder: The run's folder; a checkpoint in it is continued.
        reporter: Shows progress.
        model: A model loaded for the same recipe, to share it between runs.
        strategy: A method of your own, instead of the recipe's.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: The folder holds another run.
    """
    recipe = experiment.recipe
    check_folder(folder, recipe, resume=True)
    write_atomically(folder / RECIPE_FILE, to_toml(recipe).encode())
    with threads(recipe.model.num_threads):
        model = model or load_model(recipe, experiment.tokenizer)
        clients = build_clients(experiment, model, folder / "clients")
        strategy = strategy or build_strategy(recipe, num_clients=len(clients))
        seeds = Seeds(recipe.seed)
        state = simulate(
            strategy,
            clients,
            start_server(strategy, model.fresh),
            schedule=build_schedule(recipe),
            channel=build_channel(recipe),
            seeds=seeds,
            folder=folder,
            about={"base_digest": model.base_digest, "recipe_digest": recipe_digest(recipe)},
            reporter=reporter,
            title=recipe.strategy.name,
        )
    federation = experiment.federation
    facts: dict[str, Any] = {
        **environment(),
        "seed": recipe.seed,
        "strategy": recipe.strategy.name,
        "base_digest": model.base_digest,
        "base_is_unchanged": digest(model.base_state) == model.base_digest,
        "shared_digest": digest(state.shared),
        "clients": {
            client.client_id: {"num_train": len(client.train), "num_test": len(client.test)}
            for client in clients
        },
        "data": {
            "test_examples_also_in_training": federation.duplicates.num_across_splits,
            "examples_with_several_clients": federation.duplicates.num_across_clients,
            "training_examples_dropped": federation.num_dropped,
            "truncated_examples": count_truncated(experiment),
            "has_central_test": federation.has_central_test,
        },
    }
    result = build_result(folder, facts)
    write_json(folder / "result.json", result)
    return result


def recipe_digest(recipe: Recipe) -> str:
    """Return what two runs must have in common for one to continue the other."""
    recipe = replace(recipe, deployment=DeploymentOptions())
    return hashlib.sha256(to_toml(recipe).encode()).hexdigest()
