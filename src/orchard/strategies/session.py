"""One client's round with a budget: which experts learn, step by step, and what is seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from statistics import fmean
from typing import TypeAlias

import torch

from orchard.client.client import Client
from orchard.client.training import num_steps_before_last_epoch
from orchard.communication.messages import Task
from orchard.data.encoded import Encoded
from orchard.evaluation.loss import forward_losses
from orchard.experts.importance import ImportanceSettings, MeanImportance, UsageMeter
from orchard.experts.masking import ExpertSwitch
from orchard.experts.observation import LayerPass, concatenate, score, watch_routing
from orchard.experts.selection import (
    ExpertMask,
    all_experts,
    num_selected,
    random_ranks,
    select_experts,
    union_of_choices,
)
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.factored import factored_experts
from orchard.models.view.unbinding import unbound_experts
from orchard.results import Metrics
from orchard.strategies.expert_names import expert_of
from orchard.strategies.strategy import Plan

RANKS = ("information", "importance", "cumulative", "specific", "frequency", "random", "none")
CADENCES = ("batch", "steps", "round", "run")

Look: TypeAlias = Callable[[], tuple[LayerPass, ...]]
"""Runs the batches that a choice is made on, only where there is something to choose."""


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
        scoring_batches: Batches, each of a whole optimizer step, that experts are ranked on for
            cadences ``round`` and ``run``.
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


class Session:
    """One client's round: which experts learn, step by step, and what is seen of the routing."""

    def __init__(
        self,
        client: Client,
        task: Task,
        plan: Plan,
        settings: SubsetSettings,
        sizes: dict[str, int],
    ) -> None:
        """Start with nothing chosen; ``sizes`` is E by layer, of the whole model."""
        self.client, self.task, self.settings = client, task, settings
        self.sizes = sizes
        budget = client.budget_experts if settings.rank_by != "none" else None
        self.budget = budget or sum(sizes.values())
        self.generator = client.seeds.generator("experts", task.round_number, client.client_id)
        self.switch = ExpertSwitch()
        self.model = plan.model or client.model
        self.memory: dict[str, torch.Tensor] = {}
        # What the model calls its experts, where it does not hold them all.
        self.expert_ids: list[Sequence[int]] = [range(size) for size in sizes.values()]
        self.step = 0
        self.active: list[ExpertMask] = []
        # Routing of the step that is under way, pass by pass.
        self.passes: list[tuple[LayerPass, ...]] = []
        self.is_metering = True
        # Meters are of the last local epoch.
        self.reset_at = num_steps_before_last_epoch(
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
        """Note one forward pass of training; passes of scoring and evaluation do not count."""
        if not self.model.model.training or self.switch.learning is None:
            return
        for ids, layer, active_E, learning_E in zip(
            self.expert_ids, layers, self.active[-1], self.switch.learning, strict=True
        ):
            is_used = torch.zeros(len(ids) + 1, dtype=torch.bool)
            is_used[layer.choices_TK.flatten().cpu()] = True
            active_E[list(ids)] |= is_used[:-1]
            active_E &= learning_E
        if self.is_metering:
            self.passes.append(layers)

    def end_step(self) -> None:
        """Meter what a step has read as one batch, in however many passes it was read."""
        if self.passes:
            self.meter(concatenate(self.passes))
            self.passes = []

    def meter(self, layers: tuple[LayerPass, ...]) -> None:
        """Add the routing of one batch to usage and importance."""
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
        self.end_step()
        if self.step == self.reset_at and self.is_metering:
            self.start_meters()
        cadence = self.settings.cadence
        if cadence == "batch" or (cadence == "steps" and self.step % self.settings.every == 0):
            self.switch.learning = self.choose(lambda: route(self.model, batches))
        elif self.switch.learning is None:
            self.switch.learning = self.choose_for_round(
                lambda: route(self.model, self.scoring_batches())
            )
        self.step += 1
        learning = self.switch.learning
        self.active.append(tuple(torch.zeros_like(mask_E) for mask_E in learning))
        return [
            name
            for (index, expert), names in self.names.items()
            if not learning[index][expert]
            for name in names
        ]

    def choose_for_round(self, look: Look) -> ExpertMask:
        """Return the choice of an earlier round where it is for the run, or choose."""
        keys = [f"subset.{layer}" for layer in self.sizes]
        is_kept = self.settings.cadence == "run"
        kept = self.client.store.load(before_round=self.task.round_number) if is_kept else None
        if kept is not None and keys[0] in kept.tensors:
            chosen: ExpertMask = tuple(kept.tensors[key] for key in keys)
        else:
            chosen = self.choose(look)
        # What a carved client holds is part of its model, which is opened without its data.
        if is_kept or self.settings.mode == "carve":
            self.memory = dict(zip(keys, chosen, strict=True))
        return chosen

    def scoring_batches(self) -> list[list[Encoded]]:
        """Draw the micro-batches of as many steps as a choice for longer than one is made on."""
        size, number = self.client.training.batch_size, self.client.training.grad_accumulation
        examples = self.client.train
        num_drawn = size * number * self.settings.scoring_batches
        order = self.generator.permutation(len(examples))[:num_drawn]
        drawn = [examples[int(index)] for index in order]
        return [drawn[start : start + size] for start in range(0, len(drawn), size)]

    def choose(self, look: Look) -> ExpertMask:
        """Return the experts to train, ranked on what ``look`` sees, within the budget."""
        sizes = list(self.sizes.values())
        if self.budget >= sum(sizes):
            return all_experts(sizes)
        layers = look()
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
        self.end_step()
        usage = self.usage.usage(self.settings.usage_mode)
        importance = self.importance.mean()
        trained = self.trained()
        observed = {}
        for index, layer in enumerate(self.sizes):
            observed[f"usage.{layer}"] = usage[index].cpu()
            observed[f"importance.{layer}"] = importance[index].cpu()
            observed[f"trained.{layer}"] = trained[index]
        return observed

    def trained(self) -> ExpertMask:
        """Return the experts that learned in at least one step in which a token chose them."""
        return tuple(torch.stack(masks).any(dim=0) for masks in zip(*self.active, strict=True))

    def measure(self) -> Metrics:
        """Return the mean share of experts that a step trained, in all and by layer.

        An expert that may learn, and that no token of the step chose, does not count.
        """
        if not self.active:
            return {}
        means = {
            layer: fmean(int(step[index].sum()) for step in self.active)
            for index, layer in enumerate(self.sizes)
        }
        mean_active = fsum(means.values())
        return {
            "client/budget_experts": self.budget,
            "client/active_experts": mean_active,
            "client/active_share": mean_active / sum(self.sizes.values()),
            "client/trained_experts": num_selected(self.trained()),
            **{f"client/active_share_{layer}": m / self.sizes[layer] for layer, m in means.items()},
        }


def route(model: AdaptedModel, batches: Sequence[Sequence[Encoded]]) -> tuple[LayerPass, ...]:
    """Run batches forward as in evaluation and return their routing as one batch."""
    return concatenate(route_each(model, batches))


def route_each(
    model: AdaptedModel, batches: Sequence[Sequence[Encoded]]
) -> list[tuple[LayerPass, ...]]:
    """Run batches forward as in evaluation and return the routing of each."""
    passes: list[tuple[LayerPass, ...]] = []
    was_training = model.model.training
    model.model.eval()
    try:
        with (
            torch.no_grad(),
            unbound_experts(model.view),
            factored_experts(model.view),
            watch_routing(model.view, passes.append),
        ):
            for batch in batches:
                forward_losses(model, batch)
    finally:
        model.model.train(was_training)
    return passes
