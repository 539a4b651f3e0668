"""A recipe becomes objects, here and only here.

The tables below are all there is to look up: the command line, the documentation and the tests
read the same ones.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchard.client.client import Client
from orchard.client.store import ClientStore
from orchard.client.training import TrainingSettings
from orchard.communication.channel import DTYPES as WIRE_DTYPES
from orchard.communication.channel import Cast, Channel
from orchard.data.datasets import Example
from orchard.data.templates import Encoded, encode
from orchard.engine.progress import Reporter
from orchard.engine.simulator import Schedule, simulate
from orchard.evaluation.quality import EvaluationSettings, TestExample
from orchard.experts.grafting import GraftSettings
from orchard.federation import Federation, build_federation, read_calibration, read_retention
from orchard.models.adapters import AdaptedModel, LoraSettings
from orchard.models.loading import check_device, check_model, load_base, load_tokenizer
from orchard.recipe import (
    Recipe,
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
from orchard.server.optimizers import SGD
from orchard.strategies.fedopt import adaptive, fedavgm
from orchard.strategies.fedprox import fedprox
from orchard.strategies.flex import FlexSettings, flex
from orchard.strategies.local import local
from orchard.strategies.scaffold import scaffold
from orchard.strategies.strategy import Strategy, by_num_examples, start_server, uniformly
from orchard.trees import digest

RECIPE_FILE = "recipe.toml"


@dataclass(frozen=True)
class Method:
    """One entry of ``METHODS``.

    Attributes:
        about: One line for people.
        source: The paper.
        part: What it decides: ``server`` (one at most), ``objective``, ``experts``, ``control``
            or ``sharing``. Parts are put together in this order, whatever the order of names.
        apply: Makes a strategy into one with the method in it.
    """

    about: str
    source: str
    part: str
    apply: Callable[[Strategy, Recipe], Strategy]


_PARTS = ("server", "objective", "experts", "control", "sharing")


def _adaptive(rule: str) -> Callable[[Strategy, Recipe], Strategy]:
    def apply(strategy: Strategy, recipe: Recipe) -> Strategy:
        s = recipe.server
        return adaptive(strategy, rule=rule, lr=s.lr, beta1=s.beta1, beta2=s.beta2, tau=s.tau)

    return apply


def _fedavgm(strategy: Strategy, recipe: Recipe) -> Strategy:
    s = recipe.server
    return fedavgm(strategy, lr=s.lr, momentum=s.momentum, dampening=s.dampening)


def _flex(strategy: Strategy, recipe: Recipe) -> Strategy:
    s = recipe.strategy
    graft = GraftSettings(
        kind=s.graft_kind,
        rank=s.graft_rank,
        alpha=s.graft_alpha,
        dropout=s.graft_dropout,
        gate=s.graft_gate,
        mix=s.graft_mix,
    )
    return flex(
        strategy,
        FlexSettings(
            graft=graft,
            choice=s.graft_choice,
            calibration=s.calibration,
            calibration_blocks=s.calibration_blocks,
            calibration_tokens=s.calibration_tokens,
        ),
    )


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "fedavg": Method(
            "weighted mean of what clients send",
            "McMahan et al., 2017, arXiv:1602.05629",
            "server",
            lambda strategy, recipe: strategy,
        ),
        "fedavgm": Method(
            "server momentum", "Hsu et al., 2019, arXiv:1909.06335", "server", _fedavgm
        ),
        "fedadagrad": Method(
            "server Adagrad",
            "Reddi et al., 2021, arXiv:2003.00295",
            "server",
            _adaptive("adagrad"),
        ),
        "fedadam": Method(
            "server Adam", "Reddi et al., 2021, arXiv:2003.00295", "server", _adaptive("adam")
        ),
        "fedyogi": Method(
            "server Yogi", "Reddi et al., 2021, arXiv:2003.00295", "server", _adaptive("yogi")
        ),
        "fedprox": Method(
            "clients are pulled to the global values",
            "Li et al., 2020, arXiv:1812.06127",
            "objective",
            lambda strategy, recipe: fedprox(strategy, mu=recipe.strategy.prox_mu),
        ),
        "flex": Method(
            "a personal expert grafted beside the frozen ones",
            "Liu et al., 2025, arXiv:2506.00965",
            "experts",
            _flex,
        ),
        "scaffold": Method(
            "control variates against client drift",
            "Karimireddy et al., 2020, arXiv:1910.06378",
            "control",
            lambda strategy, recipe: strategy,  # needs the number of clients: see build_strategy
        ),
        "local": Method(
            "no aggregation: every client alone",
            "the reference that a federation has to beat",
            "sharing",
            lambda strategy, recipe: local(strategy),
        ),
    }
)
"""Name of a method to what it is; ``strategy.name`` joins several by ``+``."""


def check_strategy(name: str) -> tuple[str, ...]:
    """Return the methods of ``strategy.name`` in the order in which they are put together.

    Raises:
        ValueError: A name is unknown, stands twice, or does not go with another.
    """
    names = [part.strip() for part in name.split("+")]
    for part in names:
        if part not in METHODS:
            raise ValueError(
                f"strategy.name must be of {', '.join(METHODS)}, got {part}; "
                "join several by +, such as flex+fedadam"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"strategy.name must name a method once, got {name}")
    of_part = {part: [n for n in names if METHODS[n].part == part] for part in _PARTS}
    if len(of_part["server"]) > 1:
        raise ValueError(
            f"strategy.name must have one server optimizer, got {' and '.join(of_part['server'])}"
        )
    others = of_part["server"] + of_part["objective"] + of_part["control"]
    if of_part["sharing"] and others:
        raise ValueError(
            f"strategy.name must not join local with {others[0]}, got {name}; "
            "nothing is shared that it could act on"
        )
    return tuple(name for part in _PARTS for name in of_part[part])


def build_strategy(recipe: Recipe, *, num_clients: int) -> Strategy:
    """Return the federated method of a recipe.

    Raises:
        ValueError: See ``check_strategy``.
    """
    weigh = by_num_examples if recipe.server.weighting == "examples" else uniformly
    strategy = Strategy(weigh=weigh, optimizer=SGD(lr=recipe.server.lr))
    for name in check_strategy(recipe.strategy.name):
        if name == "scaffold":
            cohort = recipe.server.clients_per_round or num_clients
            strategy = scaffold(strategy, participation=cohort / num_clients)
        else:
            strategy = METHODS[name].apply(strategy, recipe)
    return strategy


@dataclass(frozen=True)
class Experiment:
    """A checked recipe with its data, before any model is loaded.

    Attributes:
        recipe: Every choice.
        federation: Who holds which examples.
        train: Client id to encoded training examples.
        test: Client id to encoded held-out examples.
        retention: Encoded examples of what the base knew before.
        calibration: Encoded calibration corpus.
        tokenizer: The model's.
    """

    recipe: Recipe
    federation: Federation
    train: Mapping[str, list[Encoded]]
    test: Mapping[str, list[TestExample]]
    retention: list[TestExample]
    calibration: list[Encoded]
    tokenizer: Any


def prepare_experiment(recipe: Recipe) -> Experiment:
    """Check a recipe against its data and model, without loading the model's weights.

    Raises:
        FileNotFoundError: Data or model are not there.
        ValueError: Something does not fit.
    """
    check_strategy(recipe.strategy.name)
    if not recipe.model.path:
        raise ValueError(
            "model.path must be given, got nothing; for example model.path=FOLDER on the command "
            "line, or orchard:tiny"
        )
    federation = build_federation(recipe)
    num_clients = len(federation.train)
    if recipe.server.clients_per_round > num_clients:
        raise ValueError(
            f"server.clients_per_round must be in 0..{num_clients}, got "
            f"{recipe.server.clients_per_round}; there are {num_clients} clients"
        )
    retention, calibration = read_retention(recipe), read_calibration(recipe)
    check_device(recipe.model.device)
    check_model(recipe.model.path, lora_targets=words(recipe.model.lora_targets))
    tokenizer = load_tokenizer(recipe.model.path)

    def encode_all(examples: Sequence[Example]) -> list[Encoded]:
        data = recipe.data
        return [
            encode(example, data.template, tokenizer, max_tokens=data.max_tokens)  # type: ignore[arg-type]
            for example in examples
        ]

    def encode_test(examples: Sequence[Example]) -> list[TestExample]:
        return [
            TestExample(encoded, example.response.strip())
            for encoded, example in zip(encode_all(examples), examples, strict=True)
        ]

    return Experiment(
        recipe=recipe,
        federation=federation,
        train={client: encode_all(examples) for client, examples in federation.train.items()},
        test={client: encode_test(examples) for client, examples in federation.test.items()},
        retention=encode_test(retention),
        calibration=encode_all(calibration),
        tokenizer=tokenizer,
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
    lora = LoraSettings(
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        targets=words(options.lora_targets),
    )
    seed = Seeds(recipe.seed).integer("adapters")
    return AdaptedModel(base.view, lora, tokenizer=tokenizer, base_digest=base.digest, seed=seed)


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
    )
    evaluation = EvaluationSettings(
        metrics=words(recipe.evaluation.metrics),
        max_new_tokens=recipe.evaluation.max_new_tokens,
        batch_size=recipe.evaluation.batch_size,
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


def build_channel(recipe: Recipe) -> Channel:
    """Return the way between server and clients."""
    return Channel(stages=(Cast(WIRE_DTYPES[recipe.communication.dtype]),))


def run_experiment(
    experiment: Experiment,
    *,
    folder: Path,
    reporter: Reporter,
    model: AdaptedModel | None = None,
) -> dict[str, Any]:
    """Run, or go on running, an experiment in ``folder``, and write its result there.

    Args:
        experiment: The checked recipe and its data.
        folder: The run's folder; a checkpoint in it is continued.
        reporter: Shows progress.
        model: A model loaded for the same recipe, to share it between runs.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: The folder holds another run.
    """
    recipe = experiment.recipe
    write_atomically(folder / RECIPE_FILE, to_toml(recipe).encode())
    model = model or load_model(recipe, experiment.tokenizer)
    clients = build_clients(experiment, model, folder / "clients")
    strategy = build_strategy(recipe, num_clients=len(clients))
    seeds = Seeds(recipe.seed)
    state = simulate(
        strategy,
        clients,
        start_server(strategy, model.fresh),
        schedule=build_schedule(recipe),
        channel=build_channel(recipe),
        seeds=seeds,
        folder=folder,
        about={"base_digest": model.base_digest, "recipe_digest": _recipe_digest(recipe)},
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
        },
    }
    result = build_result(folder, facts)
    write_json(folder / "result.json", result)
    return result


def _recipe_digest(recipe: Recipe) -> str:
    """Return what two runs must have in common for one to continue the other."""
    return hashlib.sha256(to_toml(recipe).encode()).hexdigest()
