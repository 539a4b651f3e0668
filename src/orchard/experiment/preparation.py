"""A recipe is checked against its data and its model, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchard.data.examples import Example
from orchard.data.templates import Encoded, Template, encode, encode_options
from orchard.evaluation.quality import TestExample, check_options
from orchard.experiment.budgets import expert_budgets
from orchard.experiment.holdings import (
    DataDigest,
    Federation,
    build_federation,
    build_site,
    data_digest,
    read_elsewhere,
)
from orchard.experiment.methods import build_strategy, check_strategy, require_path
from orchard.experiment.settings import lora_settings
from orchard.experiment.wiring import check_communication
from orchard.models.stored.loading import check_device, check_model, load_tokenizer
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words


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
        digest: Of everything that the clients hold, before it was encoded.
        remarks: What of retention and calibration was taken, left out or not read.
    """

    recipe: Recipe
    federation: Federation
    train: Mapping[str, list[Encoded]]
    test: Mapping[str, list[TestExample]]
    retention: list[TestExample]
    calibration: list[Encoded]
    tokenizer: Any
    budgets: Mapping[str, int | None]
    digest: DataDigest
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seat:
    """One client's place in a federation whose other clients are elsewhere.

    Attributes:
        client_id: Its name.
        index: Its place among all clients, from 0.
        num_clients: How many there are.
        split_seed: What draws its held-out rows; None = the recipe's seed.
    """

    client_id: str
    index: int
    num_clients: int
    split_seed: int | None = None


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
    federation = _build_seat(recipe, seat) if seat else build_federation(recipe)
    num_clients = seat.num_clients if seat else len(federation.train)
    if seat is None:
        build_strategy(recipe, num_clients=num_clients)  # what cannot be put on is refused here
    if recipe.server.clients_per_round > num_clients:
        raise ValueError(
            f"server.clients_per_round must be in 0..{num_clients}, got "
            f"{recipe.server.clients_per_round}; there are {num_clients} clients"
        )
    elsewhere = read_elsewhere(recipe)
    retention, calibration = elsewhere.retention, elsewhere.calibration
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
        digest=data_digest(federation, retention=retention, calibration=calibration),
        remarks=elsewhere.remarks,
    )


def _build_seat(recipe: Recipe, seat: Seat) -> Federation:
    seed = recipe.seed if seat.split_seed is None else seat.split_seed
    return build_site(replace(recipe, seed=seed), seat.client_id)


def data_notes(experiment: Experiment) -> list[str]:
    """Return what a person should know about the data before trusting a result."""
    limit = experiment.recipe.data.max_tokens
    truncated = count_truncated(experiment)
    notes = [*experiment.federation.notes(), *experiment.remarks]
    if truncated:
        total = sum(len(examples) for examples in experiment.train.values())
        notes.append(f"{truncated} of {total} training examples were cut to {limit} tokens")
    return notes


def count_truncated(experiment: Experiment) -> int:
    """Return how many training examples were cut to ``data.max_tokens``."""
    return sum(e.is_truncated for examples in experiment.train.values() for e in examples)
