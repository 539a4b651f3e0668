"""A prepared experiment becomes a model, clients and rounds, and ends in a result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchard.client.client import Client
from orchard.client.store import ClientStore
from orchard.client.training import TrainingSettings
from orchard.engine.progress import Reporter
from orchard.engine.secrecy import Secrecy
from orchard.engine.simulator import Schedule, run_rounds
from orchard.engine.team import Member
from orchard.engine.turns import Alone, Crew
from orchard.evaluation.quality import OF_ANSWERS, EvaluationSettings
from orchard.evaluation.slow_ways import slow_ways
from orchard.experiment.data_record import check_data, record_data
from orchard.experiment.methods import build_strategy
from orchard.experiment.own_methods import Transform, passed_name
from orchard.experiment.preparation import Experiment, count_truncated
from orchard.experiment.protecting import (
    Costs,
    build_protection,
    example_privacy,
    privacy_facts,
    private_rounds,
)
from orchard.experiment.run_folder import (
    RECIPE_FILE,
    begin_folder,
    check_folder,
    facts_of,
    folder_name,
    recipe_digest,
    recorded_as,
    writing_alone,
)
from orchard.experiment.secrecy import build_secrecy, secrecy_facts
from orchard.experiment.settings import learning_rate, lora_settings, placement_of
from orchard.experiment.start_values import starting_values
from orchard.experiment.starting import Start, record_start
from orchard.experiment.wiring import build_channel
from orchard.experiment.workers import IN_THIS_PROCESS, WorkerOptions, open_team, threads_note
from orchard.experts.submodel_source import SubmodelSource
from orchard.models.stored.loading import threads
from orchard.models.stored.placing import open_base
from orchard.models.trainable.adapters import AdaptedModel
from orchard.recipe.method_options import method_names
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.reports import build_result
from orchard.results import write_json
from orchard.seeding import Seeds
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import Strategy, start_server
from orchard.trees import Tree, digest

log = logging.getLogger(__name__)
CLIENTS = "clients"
"""Folder of a run with a folder for each client."""


def load_model(recipe: Recipe, tokenizer: Any) -> AdaptedModel:
    """Load the base and put fresh adapters on it.

    Raises:
        ValueError: Adapters do not fit.
    """
    options = recipe.model
    base = open_base(
        options.path,
        dtype=options.dtype,
        device=options.device,
        placement=placement_of(recipe),
    )
    return AdaptedModel(
        base.view,
        lora_settings(recipe),
        tokenizer=tokenizer,
        base_digest=base.digest,
        seed=Seeds(recipe.seed).integer("adapters"),
    )


def sizes_of(experiment: Experiment) -> dict[str, int]:
    """Return how many training examples each client has."""
    return {client: len(examples) for client, examples in experiment.train.items()}


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
    privacy = example_privacy(recipe, sizes_of(experiment))
    evaluation = EvaluationSettings(
        metrics=words(recipe.evaluation.metrics),
        max_new_tokens=recipe.evaluation.max_new_tokens,
        batch_size=recipe.evaluation.batch_size,
        length_normalization=recipe.evaluation.length_normalization,  # type: ignore[arg-type]
        keeps_answers=recipe.evaluation.keep_answers,
        end_ids=experiment.end_ids,
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
            store=client_store(folder, client_id, recipe, model.base_digest),
            training=replace(training, privacy=privacy.get(client_id)),
            evaluation=evaluation,
            seeds=Seeds(recipe.seed),
            budget_experts=experiment.budgets[client_id],
            submodels=submodels,
            others=experiment.others.get(client_id, ()),
        )
        for client_id, examples in experiment.federation.train.items()
    ]


def client_store(folder: Path, client_id: str, recipe: Recipe, base_digest: str) -> ClientStore:
    """Return where one client of a run keeps what is its own, in a folder of its own."""
    keep_rounds = recipe.server.keep_rounds
    return ClientStore(folder / folder_name(client_id), base_digest, keep_rounds=keep_rounds)


def check_passed(workers: WorkerOptions, passed: Strategy | Transform | None) -> None:
    """Refuse a method that no other process could be told of.

    Raises:
        ValueError: A method was passed as an object, and clients are computed in workers.
    """
    if workers.are_elsewhere and passed is not None:
        raise ValueError(
            f"strategy must be named in the recipe with {workers.number} workers, got an object "
            f'({passed_name(passed)}); write strategy.name = "module:attribute"'
        )


def slow_ways_of(experiment: Experiment, model: AdaptedModel) -> list[str]:
    """Return a sentence for each fast way that a run asks for and its model cannot go."""
    recipe, held = experiment.recipe, experiment.train.values()
    metrics = frozenset(words(recipe.evaluation.metrics))
    is_evaluated = bool(words(recipe.evaluation.models))
    return slow_ways(
        model,
        longest=max(len(example.input_ids) for examples in held for example in examples),
        packs=recipe.client.packing,
        answers=is_evaluated and bool(metrics & {*OF_ANSWERS}),
        chooses=is_evaluated and "accuracy" in metrics,
    )


def build_schedule(
    recipe: Recipe,
    *,
    rate: float | None = None,
    secrecy: Secrecy | None = None,
    arriving: Sequence[str] = (),
) -> Schedule:
    """Return what happens in which round.

    Args:
        recipe: Every choice.
        secrecy: How the server is kept from seeing single updates; None = it sees them.
        arriving: Clients that arrive after training.
        rate: Learning rate of the first round, see ``settings.learning_rate``; None = the recipe's.
    """
    client, server, evaluation = recipe.client, recipe.server, recipe.evaluation
    return Schedule(
        num_rounds=server.rounds + (recipe.strategy.arrival_rounds if arriving else 0),
        clients_per_round=server.clients_per_round,
        steps=client.steps,
        epochs=client.epochs,
        lr=client.lr if rate is None else rate,
        lr_min=client.lr_min,
        is_cosine=client.schedule == "cosine",
        evaluate_every=evaluation.every,
        models=words(evaluation.models),
        keep_rounds=server.keep_rounds,
        is_poisson=recipe.privacy.unit == "client",
        is_secret=recipe.privacy.random == "system",
        final_rounds=(
            recipe.strategy.finetune_rounds
            if "finetune" in method_names(recipe.strategy.name)
            else 0
        ),
        secrecy=secrecy,
        arriving=frozenset(arriving),
        arrival_rounds=recipe.strategy.arrival_rounds if arriving else 0,
    )


def arriving_clients(experiment: Experiment) -> list[str]:
    """Return the clients that arrive after training."""
    number = experiment.recipe.data.arriving
    return list(experiment.train)[-number:] if number else []


def check_run(
    folder: Path,
    experiment: Experiment,
    *,
    resume: bool,
    passed: Strategy | Transform | None = None,
) -> None:
    """Check that a run of ``experiment`` may be written to ``folder``, or goes on in it.

    Args:
        folder: Of the run.
        experiment: The checked recipe and its data.
        resume: Whether a run that is there may be continued.
        passed: The method, where it was passed as an object.

    Raises:
        ValueError: The folder holds a run, and ``resume`` is not set, or the recipe, a method or
            the data is another.
    """
    check_folder(folder, experiment.recipe, resume=resume, passed=passed)
    if (folder / RECIPE_FILE).exists():
        check_data(folder, experiment.digest, what=f"the run in {folder}")


@dataclass(frozen=True)
class _Ground:
    """What a run stands on: clients and who computes them, and the model that they share.

    Attributes:
        crew: The clients.
        base_digest: Of the model.
        fresh: Its adapters as they begin.
        rate: Learning rate of the first round.
        notes: A sentence for each fast way that the model cannot go.
        is_unchanged: Says whether the base is as it was loaded.
    """

    crew: Crew
    base_digest: str
    fresh: Tree
    rate: float
    notes: Sequence[str]
    is_unchanged: Callable[[], bool]


def _stand_here(
    experiment: Experiment, model: AdaptedModel | None, method: Strategy, folder: Path
) -> _Ground:
    """Load the model in this process, which computes all clients."""
    recipe = experiment.recipe
    model = model or load_model(recipe, experiment.tokenizer)
    clients = build_clients(experiment, model, folder / CLIENTS)
    return _Ground(
        Alone(method, clients, build_channel(recipe)),
        model.base_digest,
        model.fresh,
        learning_rate(recipe, model.view),
        slow_ways_of(experiment, model),
        lambda: digest(model.base_state) == model.base_digest,
    )


@contextmanager
def _stand_elsewhere(
    experiment: Experiment, folder: Path, workers: WorkerOptions
) -> Iterator[_Ground]:
    """Let workers load the model; this process has none."""
    members = [Member(name, id(experiment.test[name])) for name in experiment.train]
    with open_team(experiment.recipe, folder, members, workers) as opened:
        base, note = opened.base, threads_note(experiment.recipe, workers)
        yield _Ground(
            opened.team,
            base.digest,
            base.fresh,
            base.learning_rate,
            (*base.notes, *([note] if note else [])),
            opened.team.is_unchanged,
        )


def run_experiment(
    experiment: Experiment,
    *,
    folder: Path,
    reporter: Reporter,
    model: AdaptedModel | None = None,
    strategy: Strategy | Transform | None = None,
    warn: Callable[[str], None] = log.warning,
    workers: WorkerOptions = IN_THIS_PROCESS,
    start: Start | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """Run, or go on running, an experiment in ``folder``, and write its result there.

    Args:
        experiment: The checked recipe and its data.
        folder: The run's folder; a checkpoint in it is continued.
        reporter: Shows progress.
        model: A model loaded for the same recipe, to share it between runs.
        strategy: A method of your own: a function from a strategy to a strategy, which joins the
            recipe's methods, or a ``Strategy`` in the place of them. The run is recorded under its
            name, and goes on with it alone.
        warn: Told once of every fast way that the model cannot go.
        workers: How many processes compute the clients.
        start: How the run was started, to be written down; None = nobody asks.
        resume: Whether a run that is there may be continued.

    Returns:
        The content of ``result.json``.

    Raises:
        InUseError: Another process writes to the folder.
        ValueError: The folder holds another run, or the method cannot be put on.
    """
    check_passed(workers, strategy)
    recipe, num_clients = experiment.recipe, len(experiment.train)
    sizes = sizes_of(experiment)
    recorded = recorded_as(recipe, strategy)
    if isinstance(strategy, Strategy):
        method = strategy
    else:
        own = {passed_name(strategy): strategy} if strategy else {}
        method = build_strategy(recipe, num_clients=num_clients, own=own)
    method = replace(method, protection=build_protection(recipe, sizes))
    with threads(recipe.model.num_threads), ExitStack() as stack:
        stack.enter_context(writing_alone(folder))
        check_run(folder, experiment, resume=resume, passed=strategy)
        record_data(folder, experiment.digest)
        if start is not None:
            record_start(folder, start)
        begin_folder(folder, recorded)
        ground = (
            stack.enter_context(_stand_elsewhere(experiment, folder, workers))
            if workers.are_elsewhere
            else _stand_here(experiment, model, method, folder)
        )
        for sentence in ground.notes:
            warn(sentence)
        schedule = build_schedule(
            recipe,
            rate=ground.rate,
            secrecy=build_secrecy(recipe, sizes),
            arriving=arriving_clients(experiment),
        )
        paid = private_rounds(recipe, sizes) + schedule.arrival_rounds
        if paid < schedule.num_rounds:
            warn(
                f"privacy.epsilon = {recipe.privacy.epsilon:g} pays for {paid} of "
                f"{schedule.num_rounds} rounds; the run ends with them"
            )
            schedule = replace(schedule, num_rounds=paid)
        state = run_rounds(
            method,
            ground.crew,
            start_server(
                method, starting_values(recipe, ground.fresh, base_digest=ground.base_digest)
            ),
            schedule=schedule,
            channel=build_channel(recipe),
            seeds=Seeds(recipe.seed),
            folder=folder,
            about={
                "base_digest": ground.base_digest,
                "recipe_digest": recipe_digest(recorded.recipe),
            },
            reporter=reporter,
            title=recorded.recipe.strategy.name,
            cost=Costs(recipe, sizes).after if recipe.privacy.unit else None,
        )
        is_unchanged = ground.is_unchanged()
        facts = {**facts_of(recorded), **_facts(experiment, folder, ground, state)}
        result = build_result(folder, {**facts, "base_is_unchanged": is_unchanged})
        write_json(folder / "result.json", result)
    return result


def _facts(
    experiment: Experiment, folder: Path, ground: _Ground, state: ServerState
) -> dict[str, Any]:
    """Return what a result says of a run beside where it comes from and its metrics."""
    recipe, sizes = experiment.recipe, sizes_of(experiment)
    federation, truncated = experiment.federation, count_truncated(experiment)
    return {
        "data_digest": experiment.digest.overall,
        "base_digest": ground.base_digest,
        "shared_digest": digest(state.shared),
        "test_digest": experiment.digest.test,
        "learning_rate": ground.rate,
        **privacy_facts(recipe, sizes, rounds=state.round_number),
        **secrecy_facts(recipe),
        **({"arriving": arriving_clients(experiment)} if recipe.data.arriving else {}),
        "parameters": {
            "shared": sum(tensor.numel() for tensor in state.shared.values()),
            "private": {
                name: _num_private(client_store(folder / CLIENTS, name, recipe, ground.base_digest))
                for name in experiment.train
            },
        },
        "clients": {
            name: {
                "num_train": sizes[name],
                "num_test": len(experiment.test[name]),
                "data_digest": experiment.digest.clients[name],
            }
            for name in experiment.train
        },
        "data": {
            "test_examples_also_in_training": federation.duplicates.num_across_splits,
            "examples_with_several_clients": federation.duplicates.num_across_clients,
            "training_examples_dropped": federation.num_dropped,
            "truncated_examples": truncated["training"],
            "truncated_test_examples": truncated["test"],
            "truncated_retention_examples": truncated["retention"],
            "truncated_calibration_examples": truncated["calibration"],
            "has_central_test": federation.has_central_test,
        },
    }


def _num_private(store: ClientStore) -> int:
    """Return how many numbers a client trained and keeps after the last round."""
    rounds = store.rounds()
    kept = store.load(before_round=rounds[-1] + 1) if rounds else None
    if kept is None:
        return 0
    return sum(
        tensor.numel()
        for name, tensor in kept.tensors.items()
        if tensor.is_floating_point() and not name.startswith("control.")
    )
