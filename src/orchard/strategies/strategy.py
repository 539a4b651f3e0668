"""The contract: a federated method is five answers.

What does a client train, and what does it keep (``prepare``)? What does it minimize
(``objective``)? What does it send, and how much does each name count (``weigh``)? How do many
updates become one (``aggregate``)? How does the global tree move (``optimizer``)?

Whoever runs a federation calls ``train_client``, ``evaluate_client`` and ``update_server``, and
needs to know nothing else of the method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import torch

from orchard.client.answers import keep_answers
from orchard.client.client import Client
from orchard.client.objectives import Objective, causal_lm
from orchard.client.private_training import train_privately
from orchard.client.scores import keep_scores
from orchard.client.store import Personal
from orchard.client.training import HoldStill, TrainingReport, train
from orchard.communication.messages import Task, Update
from orchard.data.encoded import Encoded
from orchard.evaluation.quality import TESTED_ON, KeepAnswers, KeepScores, evaluate
from orchard.models.trainable.adapters import AdaptedModel
from orchard.results import Metrics
from orchard.server.aggregation import mean
from orchard.server.checkpoint import ServerState
from orchard.server.optimizers import SGD, ServerOptimizer
from orchard.server.privacy import SLOT, Protection
from orchard.trees import Tree


@dataclass(frozen=True)
class OwnPart:
    """What a client trains apart from what it sends, and keeps: its personal model.

    Attributes:
        names: What is trained; of names that are shared too, a copy of the client's own.
        examples: What it trains on; empty = it does not.
        objective: What it minimizes; the global values of ``names`` are in ``broadcast``.
        memory: Tensors that are kept beside it without training them.
        settle: Called after training with the values before it; leaves in the model what is kept,
            and returns scalars for the client's metrics.
    """

    names: tuple[str, ...]
    examples: Sequence[Encoded]
    objective: Objective = causal_lm
    memory: Tree = field(default_factory=dict)
    settle: Callable[[Tree], Metrics] = lambda before: {}


@dataclass(frozen=True)
class Plan:
    """What one client does in one round.

    Attributes:
        shared: Names that it trains and sends.
        personal: Names that it trains and keeps.
        from_global: Those of ``personal`` that start at their global values, until the client keeps
            its own.
        own: Opens what it trains apart; None = nothing.
        memory: Tensors that it keeps without training them, such as a control variate.
        keep_mean_gradient: Whether training reports its mean gradient of the shared names.
        model: The model to train in the place of the client's, such as a submodel.
        hold_still: Which names an optimizer step must not move; None = it moves all of them.
        drops_out: Whether the client leaves the round: it neither trains nor keeps nor sends.
        watch: Called after each forward pass of training; tensors in its graph, for the objective.
        observe: Called after training; what was seen in it, for ``weigh``.
        measure: Called after training; scalars to add to the client's metrics.
    """

    shared: tuple[str, ...]
    personal: tuple[str, ...] = ()
    from_global: frozenset[str] = frozenset()
    own: Callable[[], AbstractContextManager[OwnPart]] | None = None
    memory: Tree = field(default_factory=dict)
    keep_mean_gradient: bool = False
    model: AdaptedModel | None = None
    hold_still: HoldStill | None = None
    drops_out: bool = False
    watch: Callable[[], Tree] = dict
    observe: Callable[[], Tree] = dict
    measure: Callable[[], Metrics] = dict


@dataclass(frozen=True)
class Trained:
    """What local training gave. Personal tensors are not in it, so no answer can send them.

    Attributes:
        plan: What was to be trained.
        delta: Name to local minus global, of the shared names.
        report: How training went.
        observed: What the plan's ``observe`` returned.
    """

    plan: Plan
    delta: Tree
    report: TrainingReport
    observed: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Contribution:
    """What a client sends of its training, and what it remembers.

    Attributes:
        delta: Name to tensor.
        weight: Name to how much it counts, at least 0; the names of ``delta``.
        memory: Tensors that the client keeps without training them, after this round.
        metrics: Scalars to add to the client's metrics.
    """

    delta: Tree
    weight: Mapping[str, float]
    memory: Tree
    metrics: Metrics = field(default_factory=dict)


_DROPPED_OUT = Contribution({}, {}, {}, {"client/dropped_out": 1.0, "client/train_seconds": 0.0})
Prepare: TypeAlias = Callable[[Client, Task], AbstractContextManager[Plan]]
Weigh: TypeAlias = Callable[[Client, Task, Trained], Contribution]
Aggregate: TypeAlias = Callable[[Iterable[Update], Tree], Tree]


@contextmanager
def train_everything(client: Client, task: Task) -> Iterator[Plan]:
    """Train all adapters and send all of them."""
    yield Plan(shared=client.model.adapter_names)


def by_num_examples(client: Client, task: Task, trained: Trained) -> Contribution:
    """Let every name count as many times as the client has training examples."""
    weight = dict.fromkeys(trained.delta, float(client.num_examples))
    return Contribution(trained.delta, weight, trained.plan.memory)


def uniformly(client: Client, task: Task, trained: Trained) -> Contribution:
    """Let every client count the same."""
    return Contribution(trained.delta, dict.fromkeys(trained.delta, 1.0), trained.plan.memory)


def mean_delta(updates: Iterable[Update], shared: Tree) -> dict[str, torch.Tensor]:
    """Return the weighted mean of every name that was sent, wherever the global tree stands."""
    return mean(updates)


@dataclass(frozen=True)
class Strategy:
    """A federated method, as five answers. As it stands, it is FedAvg.

    Attributes:
        prepare: Readies the shared model for one client; leaving its context undoes that.
        objective: What local training minimizes.
        weigh: What is sent after training, and how much each name counts.
        aggregate: Reduces a stream of updates to one delta, given the global tree that they
            started from.
        optimizer: Moves the global tree.
        protection: Bounds what one client changes and adds noise, in the place of ``aggregate``;
            None = nothing does.
    """

    prepare: Prepare = train_everything
    objective: Objective = causal_lm
    weigh: Weigh = by_num_examples
    aggregate: Aggregate = mean_delta
    optimizer: ServerOptimizer = field(default_factory=SGD)
    protection: Protection | None = None


def _place(client: Client, task: Task, plan: Plan) -> None:
    """Load fresh adapters, over them the global values, over them the client's own."""
    model = plan.model or client.model
    place_global(model, task)
    if kept := client.store.load(before_round=task.round_number):
        inherited = plan.from_global - kept.tensors.keys()
        model.load({name: kept.tensors[name] for name in plan.personal if name not in inherited})


def place_global(model: AdaptedModel, task: Task) -> None:
    """Load the global values; an adapter that has none is fresh and changes nothing."""
    names = model.adapter_names
    missing = [name for name in names if name not in task.shared]
    model.load({name: task.shared[name] for name in names if name in task.shared})
    model.load({name: model.fresh[name] for name in missing})


def train_client(strategy: Strategy, client: Client, task: Task) -> Update:
    """Train one client for one round and return what it sends.

    Its personal tensors are on its disk when this returns. A client that drops out sends no name,
    and its local model is what it was sent.

    Raises:
        FloatingPointError: The loss is NaN or infinite.
        ValueError: Global or personal tensors do not fit the model.
    """
    started = time.monotonic()
    with strategy.prepare(client, task) as plan:
        own, own_metrics = ({}, {}) if plan.drops_out else _train_own(client, task, plan)
        started = time.monotonic() if own_metrics else started
        _place(client, task, plan)
        prepare_seconds = time.monotonic() - started
        sent = _DROPPED_OUT if plan.drops_out else _train(strategy, client, task, plan, own)
        metrics = {
            "client/num_examples": client.num_examples,
            "client/prepare_seconds": prepare_seconds,
            **sent.metrics,
            **own_metrics,
        }
        if task.evaluate_local:
            started = time.monotonic()
            metrics |= _measure(client, "local", task.round_number, plan.model)
            metrics["client/evaluation_seconds"] = time.monotonic() - started
    # What is sent moves a global value; a personal tensor has none.
    leaked = sorted(sent.delta.keys() - (task.shared.keys() - set(plan.personal)))
    assert not leaked, f"{leaked[0]} in an update, which is no global value"
    return Update(client.client_id, task.round_number, sent.delta, sent.weight, metrics)


@contextmanager
def _own_part(client: Client, task: Task, plan: Plan) -> Iterator[OwnPart]:
    """Open what a client trains apart, on the global values, with what it has kept of it."""
    assert plan.own is not None
    assert plan.model is None, "what is trained apart is of the whole model"
    with plan.own() as own:
        place_global(client.model, task)
        if kept := client.store.load(before_round=task.round_number):
            client.model.load({name: kept.tensors[name] for name in own.names})
        yield own


def _train_own(client: Client, task: Task, plan: Plan) -> tuple[Tree, Metrics]:
    """Train what a client trains apart, and return what it keeps of it."""
    if plan.own is None:
        return {}, {}
    turn = task.round_number, client.client_id
    with _own_part(client, task, plan) as own:
        metrics: Metrics = {}
        if own.examples:
            before = client.model.read(own.names)
            report = train(
                client.model,
                own.examples,
                shared=own.names,
                personal=(),
                objective=own.objective,
                memory={},
                broadcast=task.shared,
                settings=client.training,
                local=task.settings,
                generator=client.seeds.generator("own batches", *turn),
                dropout_seed=client.seeds.integer("own dropout", *turn),
            )
            metrics = {
                "client/own_train_loss": report.loss,
                "client/own_train_seconds": report.seconds,
                "client/own_num_steps": report.num_steps,
                **own.settle(before),
            }
        return {**client.model.read(own.names), **own.memory}, metrics


def _train_privately(client: Client, task: Task, plan: Plan) -> TrainingReport | None:
    """Train so that each example is protected; None where none is to be."""
    if client.training.privacy is None:
        return None
    turn = task.round_number, client.client_id
    return train_privately(
        plan.model or client.model,
        client.train,
        names=(*plan.shared, *plan.personal),
        settings=client.training,
        local=task.settings,
        seeds=client.seeds,
        turn=turn,
        dropout_seed=client.seeds.integer("dropout", *turn),
    )


def _train(strategy: Strategy, client: Client, task: Task, plan: Plan, own: Tree) -> Contribution:
    """Train by a plan, save what the client keeps, and return what it sends."""
    model = plan.model or client.model
    if own and not (plan.shared or plan.personal):
        client.store.save(Personal(own), round_number=task.round_number)
        return Contribution({}, {}, {}, {"client/train_seconds": 0.0})
    turn = task.round_number, client.client_id
    report = _train_privately(client, task, plan) or train(
        model,
        client.train,
        shared=plan.shared,
        personal=plan.personal,
        objective=strategy.objective,
        memory=plan.memory,
        broadcast=task.shared,
        settings=client.training,
        local=task.settings,
        generator=client.seeds.generator("batches", *turn),
        dropout_seed=client.seeds.integer("dropout", *turn),
        keep_mean_gradient=plan.keep_mean_gradient,
        hold_still=plan.hold_still,
        watch=plan.watch,
    )
    trained = Trained(plan, _delta(model, plan, task), report, plan.observe())
    sent = strategy.weigh(client, task, trained)
    if kept := {**model.read(plan.personal), **sent.memory, **own}:
        client.store.save(Personal(kept), round_number=task.round_number)
    metrics = {
        "client/train_loss": report.loss,
        "client/train_seconds": report.seconds,
        "client/num_tokens": report.num_tokens,
        "client/num_steps": report.num_steps,
        **plan.measure(),
        **sent.metrics,
    }
    return replace(sent, metrics=metrics)


def evaluate_client(
    strategy: Strategy,
    client: Client,
    task: Task,
    models: Iterable[str],
    *,
    known: Metrics | None = None,
) -> dict[str, float]:
    """Evaluate a client's models on its held-out examples.

    Args:
        strategy: The method.
        client: The client.
        task: Holds the global values; its round is the one after those values.
        models: Of ``base``, ``global`` and ``personal`` (global values plus what the client
            keeps). Where a client keeps nothing and holds the whole model, its personal model is
            the global one.
        known: Values of the base or global model on the same examples, measured before.

    Returns:
        ``model/metric`` to value; ``model/retention_metric`` and ``model/others_metric`` too where
        there is such.
    """
    metrics = dict(known or {})
    models, completed = set(models), task.round_number - 1
    has_global = "global" in models or any(name.startswith("global/") for name in metrics)
    if "base" in models:
        with client.model.without_adapters():
            metrics |= _measure(client, "base", completed)
    if "global" in models:
        place_global(client.model, task)
        metrics |= _measure(client, "global", completed)
    if "personal" in models:
        with strategy.prepare(client, task) as plan:
            if plan.own is not None:
                with _own_part(client, task, plan):
                    metrics |= _measure(client, "personal", completed)
            elif plan.personal or plan.model is not None or not has_global:
                _place(client, task, plan)
                metrics |= _measure(client, "personal", completed, plan.model)
            else:
                same = {k: v for k, v in metrics.items() if k.startswith("global/")}
                metrics |= {k.replace("global/", "personal/", 1): v for k, v in same.items()}
    return metrics


def _delta(model: AdaptedModel, plan: Plan, task: Task) -> dict[str, torch.Tensor]:
    """Return local minus global of the shared names, without a second copy of either."""
    return {
        name: tensor.detach().float().cpu()
        - (task.shared[name] if name in task.shared else model.fresh[name]).float()
        for name, tensor in model.parameters(plan.shared).items()
    }


def _measure(
    client: Client, kind: str, round_number: int, model: AdaptedModel | None = None
) -> dict[str, float]:
    """Evaluate a model as it stands: on the client's tests, what it must retain, others' tests."""
    model = model or client.model

    def keep(of: str) -> KeepAnswers | None:
        if not client.evaluation.keeps_answers:
            return None
        return partial(
            keep_answers,
            client.store,
            client_id=client.client_id,
            round_number=round_number,
            model=kind,
            of=of,
        )

    def note(of: str) -> KeepScores | None:
        if not client.evaluation.keeps_answers:
            return None
        return partial(keep_scores, client.store, round_number=round_number, model=kind, of=of)

    settings = client.evaluation
    held_out = {"test": client.test, "retention": client.retention, "others": client.others}
    values: dict[str, float] = {}
    for of, examples in held_out.items():
        if examples or of == "test":
            found = evaluate(model, examples, settings, keep=keep(of), note=note(of))
            values |= {f"{kind}/{TESTED_ON[of]}{name}": value for name, value in found.items()}
    return values


def start_server(strategy: Strategy, adapters: Tree) -> ServerState:
    """Return the state of round 0, from the fresh adapters."""
    shared, slots = strategy.optimizer.start({n: t.float() for n, t in adapters.items()})
    return ServerState(0, shared, slots)


def update_server(strategy: Strategy, state: ServerState, updates: Iterable[Update]) -> ServerState:
    """Aggregate one round's updates, read once as a stream, and move the global tree.

    Raises:
        ValueError: An update does not fit the global tree, or there is none.
    """
    num_updates = 0

    def counted(update: Update) -> Update:
        nonlocal num_updates
        num_updates += 1
        return update

    # Unlike a generator, map holds no update while the next one is made.
    number = state.round_number + 1
    delta: Tree
    kept: Mapping[str, Tree] = {}
    if strategy.protection is not None:
        delta, kept = strategy.protection.aggregate(
            map(counted, updates), state.shared, state.slots, round_number=number
        )
    else:
        delta = strategy.aggregate(map(counted, updates), state.shared)
    if num_updates == 0 and strategy.protection is None:
        raise ValueError(
            f"round {number} must have at least one update, got none; "
            "a round in which nobody answered does not count"
        )
    own = {name: tree for name, tree in state.slots.items() if name != SLOT}
    shared, slots = strategy.optimizer.step(state.shared, delta, own)
    return replace(state, round_number=number, shared=shared, slots={**slots, **kept})
