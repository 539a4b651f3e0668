"""Clients that train some of the experts: what HFedMoE and the methods it is compared with share.

A client with a budget ranks the experts on its own batches, chooses the best of them, and trains
those with everything that is not an expert. How it ranks, how often it chooses and whether it
holds the other experts at all are settings; what it then sends is up to each method.

What ``weigh`` reads of the training, for every MoE layer, in the numbering of the checkpoint:
``usage.layers.3`` and ``importance.layers.3``, (E,) float32, and ``trained.layers.3``, (E,) bool,
of the experts that at least one step moved.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch

from orchard.client.client import Client
from orchard.client.training import num_steps_before_last_epoch
from orchard.communication.messages import Task
from orchard.data.templates import Encoded
from orchard.evaluation.loss import forward_losses
from orchard.experts.importance import (
    ImportanceSettings,
    MeanImportance,
    UsageMeter,
)
from orchard.experts.masking import ExpertSwitch, detached_experts
from orchard.experts.observation import LayerPass, concatenate, score, watch_routing
from orchard.experts.selection import (
    ExpertMask,
    all_experts,
    num_selected,
    random_ranks,
    select_experts,
    union_of_choices,
)
from orchard.models.adapters import AdaptedModel
from orchard.results import Metrics
from orchard.strategies.strategy import Plan, Strategy, place_global
from orchard.trees import Tree

RANKS = ("information", "importance", "cumulative", "specific", "frequency", "random", "none")
CADENCES = ("batch", "steps", "round", "run")
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.")
_ROUTER = re.compile(r"(.+)\.router(_bias)?\.")


@dataclass(frozen=True)
class SubsetSettings:
    """How a client comes to the experts that it trains.

    Attributes:
        mode: ``mask`` holds all experts and trains some; ``carve`` holds the chosen ones alone.
        rank_by: ``information`` (HFedMoE's I), ``importance`` (its s), ``cumulative``,
            ``specific``, ``frequency`` (how many tokens chose the expert), ``random``, or ``none``,
            which trains every expert whatever the budget and needs no scoring pass.
        cadence: Choose anew for every ``batch``, every so many ``steps``, each ``round``, or once
            in a ``run``.
        every: Optimizer steps between choices of cadence ``steps``.
        scoring_batches: Batches that experts are ranked on for cadences ``round`` and ``run``.
        importance: How routing becomes scores.
        usage_mode: How routing becomes usage; see ``UsageMeter.usage``.
    """

    mode: str = "mask"
    rank_by: str = "information"
    cadence: str = "batch"
    every: int = 1
    scoring_batches: int = 4
    importance: ImportanceSettings = field(default_factory=ImportanceSettings)
    usage_mode: str = "softmax_mean"


def expert_of(name: str) -> tuple[str, int] | None:
    """Return layer and expert that a name belongs to, or None where it belongs to none."""
    match = _EXPERT.match(name)
    return (match[1], int(match[2])) if match else None


def is_router(name: str) -> bool:
    """Say whether a name belongs to a router."""
    return _ROUTER.match(name) is not None


def layer_values(observed: Tree, kind: str) -> dict[str, torch.Tensor]:
    """Return ``usage``, ``importance`` or ``trained`` of what was observed, by layer."""
    prefix = f"{kind}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in observed.items()
        if name.startswith(prefix)
    }


def with_subset(strategy: Strategy, settings: SubsetSettings) -> Strategy:
    """Let every client of ``strategy`` train only the experts that its budget affords."""

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with strategy.prepare(client, task) as plan:
            opened = _carved if settings.mode == "carve" else _masked
            with opened(client, task, plan, settings) as own:
                yield own

    return replace(strategy, prepare=prepare)


@contextmanager
def _masked(client: Client, task: Task, plan: Plan, settings: SubsetSettings) -> Iterator[Plan]:
    model = plan.model or client.model
    sizes = {layer.name: layer.num_experts for layer in model.view.layers}
    session = _Session(client, task, plan, settings, sizes)
    with detached_experts(model.view) as switch, watch_routing(model.view, session.see):
        session.switch = switch
        if settings.rank_by == "none":
            switch.learning = all_experts(list(sizes.values()))
        elif settings.cadence == "run":
            place_global(model, task)
            switch.learning = session.choose_for_round(route(model, session.scoring_batches()))
        yield session.extend(plan)


@contextmanager
def _carved(client: Client, task: Task, plan: Plan, settings: SubsetSettings) -> Iterator[Plan]:
    assert client.submodels is not None, "a client that carves needs a checkpoint"
    assert plan.model is None, "one submodel at a time"
    with client.submodels.skeleton(task.shared) as skeleton:
        sizes = {layer.name: layer.num_experts for layer in skeleton.view.layers}
        session = _Session(client, task, plan, settings, sizes)
        layers = route(skeleton, session.scoring_batches())
    # Usage is of whole routers, as other clients measure it: among its own experts alone, those of
    # a client with few would all look much used.
    session.meter(layers)
    session.reset_at = None
    session.switch.learning = session.choose_for_round(layers)
    kept = [mask_E.nonzero().flatten().tolist() for mask_E in session.switch.learning]
    model = client.submodels.carve(kept)
    names = set(model.adapter_names)
    yield replace(
        session.extend(plan),
        model=model,
        shared=tuple(name for name in plan.shared if name in names),
    )


class _Session:
    """One client's round: which experts learn, step by step, and what is seen of the routing."""

    def __init__(
        self,
        client: Client,
        task: Task,
        plan: Plan,
        settings: SubsetSettings,
        sizes: dict[str, int],
    ) -> None:
        self.client, self.task, self.settings = client, task, settings
        self.sizes = sizes
        budget = client.budget_experts if settings.rank_by != "none" else None
        self.budget = budget or sum(sizes.values())
        self.generator = client.seeds.generator("experts", task.round_number, client.client_id)
        self.switch = ExpertSwitch()
        self.model = plan.model or client.model
        self.memory: dict[str, torch.Tensor] = {}
        self.step = 0
        self.num_learning: list[list[int]] = []
        self.trained = [torch.zeros(size, dtype=torch.bool) for size in sizes.values()]
        # Meters are of the last local epoch.
        self.reset_at: int | None = num_steps_before_last_epoch(
            client.num_examples, client.training, task.settings
        )
        self.start_meters()
        positions = {layer: index for index, layer in enumerate(sizes)}
        self.names: dict[tuple[int, int], list[str]] = {}
        for name in plan.shared:
            found = expert_of(name)
            if found is not None:
                self.names.setdefault((positions[found[0]], found[1]), []).append(name)

    def extend(self, plan: Plan) -> Plan:
        """Return the plan with the session's answers in it."""
        return replace(
            plan,
            memory={**plan.memory, **self.memory},
            hold_still=self.hold_still,
            observe=self.observe,
            measure=lambda: {**plan.measure(), **self.measure()},
        )

    def start_meters(self) -> None:
        """Forget what was seen."""
        self.usage = UsageMeter(list(self.sizes.values()))
        self.importance = MeanImportance()

    def see(self, layers: tuple[LayerPass, ...]) -> None:
        """Meter one forward pass of training; passes of scoring and evaluation do not count."""
        if self.model.model.training:
            self.meter(layers)

    def meter(self, layers: tuple[LayerPass, ...]) -> None:
        """Add routing to usage and importance."""
        for index, layer in enumerate(layers):
            self.usage.add(
                index,
                layer.probabilities_TE,
                choices_TK=layer.choices_TK,
                sample_T=layer.sample_T,
            )
        self.importance.add(score(layers, self.settings.importance))

    def hold_still(self, batches: Sequence[Sequence[Encoded]]) -> Collection[str]:
        """Choose for the coming step where it is time to, and return the names that stay."""
        if self.step == self.reset_at:
            self.start_meters()
        cadence, every = self.settings.cadence, self.settings.every
        is_due = cadence == "batch" or (cadence == "steps" and self.step % every == 0)
        if is_due and self.settings.rank_by != "none":
            self.switch.learning = self.choose(route(self.model, batches))
        elif self.switch.learning is None:
            layers = route(self.model, self.scoring_batches())
            self.switch.learning = self.choose_for_round(layers)
        self.step += 1
        learning = self.switch.learning
        self.num_learning.append([int(mask_E.sum()) for mask_E in learning])
        self.trained = [t | mask_E for t, mask_E in zip(self.trained, learning, strict=True)]
        return [
            name
            for (index, expert), names in self.names.items()
            if not learning[index][expert]
            for name in names
        ]

    def choose_for_round(self, layers: tuple[LayerPass, ...]) -> ExpertMask:
        """Return the choice of an earlier round where it is for the run, or choose."""
        keys = [f"subset.{layer}" for layer in self.sizes]
        is_kept = self.settings.cadence == "run"
        kept = self.client.store.load(before_round=self.task.round_number) if is_kept else None
        if kept is not None and keys[0] in kept.tensors:
            chosen: ExpertMask = tuple(kept.tensors[key] for key in keys)
        else:
            chosen = self.choose(layers)
        if is_kept:
            self.memory = dict(zip(keys, chosen, strict=True))
        return chosen

    def scoring_batches(self) -> list[list[Encoded]]:
        """Draw the batches that a choice for longer than a batch is made on."""
        size = self.client.training.batch_size
        examples = self.client.train
        order = self.generator.permutation(len(examples))[: size * self.settings.scoring_batches]
        drawn = [examples[int(index)] for index in order]
        return [drawn[start : start + size] for start in range(0, len(drawn), size)]

    def choose(self, layers: tuple[LayerPass, ...]) -> ExpertMask:
        """Return the experts to train, ranked on these passes, within the budget."""
        sizes = list(self.sizes.values())
        union = union_of_choices([layer.choices_TK for layer in layers], sizes)
        kind = self.settings.rank_by
        if kind == "random":
            rank = random_ranks(union, self.generator)
        elif kind == "frequency":
            rank = tuple(
                torch.bincount(layer.choices_TK.flatten(), minlength=size + 1)[:size].float()
                for layer, size in zip(layers, sizes, strict=True)
            )
        else:
            scores = score(layers, self.settings.importance)
            rank = tuple(layer.ranked_by(kind) for layer in scores)
        return tuple(mask_E.cpu() for mask_E in select_experts(rank, union, self.budget))

    def observe(self) -> dict[str, torch.Tensor]:
        """Return usage and importance, and which experts were trained; see the module."""
        usage = self.usage.usage(self.settings.usage_mode)
        importance = self.importance.mean()
        observed = {}
        for index, layer in enumerate(self.sizes):
            observed[f"usage.{layer}"] = usage[index].cpu()
            observed[f"importance.{layer}"] = importance[index].cpu()
            observed[f"trained.{layer}"] = self.trained[index]
        return observed

    def measure(self) -> Metrics:
        """Return the mean share of experts that a step trained, in all and by layer."""
        if not self.num_learning:
            return {}
        sizes = self.sizes
        shares = {
            f"client/active_share_{layer}": fmean(step[index] for step in self.num_learning) / size
            for index, (layer, size) in enumerate(sizes.items())
        }
        mean_active = fmean(sum(step) for step in self.num_learning)
        return {
            "client/budget_experts": self.budget,
            "client/active_experts": mean_active,
            "client/active_share": mean_active / sum(sizes.values()),
            "client/trained_experts": num_selected(tuple(self.trained)),
            **shares,
        }


def route(model: AdaptedModel, batches: Sequence[Sequence[Encoded]]) -> tuple[LayerPass, ...]:
    """Run batches forward as in evaluation and return their routing as one batch."""
    passes: list[tuple[LayerPass, ...]] = []
    was_training = model.model.training
    model.model.eval()
    try:
        with torch.no_grad(), watch_routing(model.view, passes.append):
            for batch in batches:
                forward_losses(model, batch)
    finally:
        model.model.train(was_training)
    return concatenate(passes)
