"""Clients that train some of the experts: what HFedMoE and the methods it is compared with share.

A client with a budget ranks the experts on its own batches, chooses the best of them, and trains
those with everything that is not an expert. How it ranks, how often it chooses and whether it
holds the other experts at all are settings; what it then sends is up to each method.

What ``weigh`` reads of the training, for every MoE layer, in the numbering of the checkpoint:
``usage.layers.3`` and ``importance.layers.3``, (E,) float32, and ``trained.layers.3``, (E,) bool,
of the experts that learned in a step in which a token chose them. A choice for a run,
and what a carved client holds, is also in the plan's memory, as ``subset.layers.3``, (E,) bool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.experts.masking import detached_experts
from orchard.experts.observation import LayerPass, concatenate, watch_routing
from orchard.strategies.expert_names import Expert
from orchard.strategies.session import Session, SubsetSettings, route, route_each
from orchard.strategies.strategy import Contribution, Plan, Strategy, place_global
from orchard.trees import Tree


def layer_values(tree: Tree, kind: str) -> dict[str, torch.Tensor]:
    """Return ``usage``, ``importance``, ``trained`` or ``subset`` of a tree, by layer."""
    prefix = f"{kind}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tree.items()
        if name.startswith(prefix)
    }


def marked(masks: Mapping[str, torch.Tensor]) -> set[Expert]:
    """Return the experts that are marked in masks (E,) by layer."""
    return {
        (layer, expert)
        for layer, mask_E in masks.items()
        for expert in mask_E.nonzero().flatten().tolist()
    }


def send_only(sent: Contribution, is_sent: Callable[[str], bool]) -> Contribution:
    """Return a contribution with only those of its names that ``is_sent`` says."""
    names = [name for name in sent.weight if is_sent(name)]
    return replace(
        sent,
        delta={name: sent.delta[name] for name in names},
        weight={name: sent.weight[name] for name in names},
    )


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
    session = Session(client, task, plan, settings, sizes)

    def look() -> tuple[LayerPass, ...]:
        place_global(model, task)
        return route(model, session.scoring_batches())

    with detached_experts(model.view) as switch, watch_routing(model.view, session.see):
        session.switch = switch
        if settings.cadence == "run":
            switch.learning = session.choose_for_round(look)
        yield session.extend(plan)


@contextmanager
def _carved(client: Client, task: Task, plan: Plan, settings: SubsetSettings) -> Iterator[Plan]:
    assert client.submodels is not None, "a client that carves needs a checkpoint"
    assert plan.model is None, "one submodel at a time"
    with client.submodels.skeleton(task.shared) as skeleton:
        sizes = {layer.name: layer.num_experts for layer in skeleton.view.layers}
        session = Session(client, task, plan, settings, sizes)
        passes = route_each(skeleton, session.scoring_batches())
    # Usage is of whole routers, as other clients measure it: among its own experts alone, those of
    # a client with few would all look much used.
    number = client.training.grad_accumulation
    for start in range(0, len(passes), number):
        session.meter(concatenate(passes[start : start + number]))
    session.is_metering = False
    session.switch.learning = session.choose_for_round(lambda: concatenate(passes))
    kept = [mask_E.nonzero().flatten().tolist() for mask_E in session.switch.learning]
    model = client.submodels.carve(kept)
    session.model = model
    session.expert_ids = [layer.expert_ids for layer in model.view.layers]
    names = set(model.adapter_names)
    with watch_routing(model.view, session.see):
        yield replace(
            session.extend(plan),
            model=model,
            shared=tuple(name for name in plan.shared if name in names),
        )
