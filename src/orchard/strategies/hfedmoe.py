"""HFedMoE: Resource-aware Heterogeneous Federated Learning with Mixture-of-Experts.

Fang et al., 2026, arXiv:2601.00583. In words:

1. For every batch a client scores all experts by its router's probabilities: importance, less
   what an information bottleneck counts as redundant.
2. Of the experts that the batch uses it trains the best that its budget affords, at least one in
   each layer; the others run, and stay as they are.
3. After training it sends the experts that its data used enough, and everything that is no expert.
4. The server averages each expert over the clients that sent it, by their examples; an expert
   that nobody sent keeps its value.
5. Routers are averaged by preference: usage times importance over the experts that a client
   used enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from orchard.client.client import Client
from orchard.communication.messages import Task, Update
from orchard.experts.selection import passing, preference
from orchard.server.aggregation import mean
from orchard.strategies.expert_names import Expert, expert_of, is_router
from orchard.strategies.session import SubsetSettings
from orchard.strategies.strategy import Aggregate, Contribution, Strategy, Trained
from orchard.strategies.subset import layer_values, marked, send_only, with_subset
from orchard.trees import Tree

NOBODY_PREFERS = 1e-12  # per example: decides only where no client has any preference at all


@dataclass(frozen=True)
class HfedmoeSettings:
    """What HFedMoE leaves open.

    Attributes:
        subset: How experts are chosen.
        threshold: Usage from which an expert is sent, in units of 1/E of its layer.
        require_trained: Whether an expert must also have been trained in the round to be sent.
        experts: ``usage`` sends the experts that pass; ``all`` sends all of them.
        router: ``preference`` (Eqs. 18-21, normalized); ``literal`` (Eq. 21 as printed);
            ``damped`` (its weights on the deltas); ``examples``, as everything that is no expert.
    """

    subset: SubsetSettings = field(default_factory=SubsetSettings)
    threshold: float = 1.0
    require_trained: bool = False
    experts: str = "usage"
    router: str = "preference"


def hfedmoe(strategy: Strategy, settings: HfedmoeSettings) -> Strategy:
    """Let the clients of ``strategy`` choose experts, and the server weigh them by their use."""

    def weigh(client: Client, task: Task, trained: Trained) -> Contribution:
        sent = strategy.weigh(client, task, trained)
        usage = layer_values(trained.observed, "usage")
        was_trained = layer_values(trained.observed, "trained")
        importance = layer_values(trained.observed, "importance")
        passed = passing(
            list(usage.values()),
            settings.threshold,
            tuple(was_trained.values()) if settings.require_trained else None,
        )
        # Of a layer that was carved only its own experts can be sent.
        held = {expert_of(name) for name in trained.delta}
        passed = tuple(
            torch.tensor([bool(p) and (layer, e) in held for e, p in enumerate(mask_E)])
            for layer, mask_E in zip(usage, passed, strict=True)
        )
        mass = preference(list(usage.values()), list(importance.values()), passed)
        used = {None, *marked(dict(zip(usage, passed, strict=True)))}
        if settings.experts == "usage":
            sent = send_only(sent, lambda name: expert_of(name) in used)
        weight = dict(sent.weight)
        if settings.router != "examples":
            own = {n: mass if mass > 0 else NOBODY_PREFERS * w for n, w in weight.items()}
            weight |= {name: own[name] for name in filter(is_router, weight)}
        return replace(sent, weight=weight, metrics={**sent.metrics, "client/preference": mass})

    aggregate = strategy.aggregate
    if settings.router in ("literal", "damped"):
        aggregate = _unnormalized(settings.router)
    subset = with_subset(strategy, settings.subset)
    return replace(subset, weigh=weigh, aggregate=aggregate)


def _unnormalized(kind: str) -> Aggregate:
    """Return the aggregation in which weights of routers do not sum to 1.

    With alpha(c) a client's preference over the number of experts that anyone sent (Eq. 20):
    ``literal`` makes the new router the sum of alpha(c) times the client's (Eq. 21), which shrinks
    it, and ``damped`` adds alpha(c) times the client's delta to the old one. Where nobody sent an
    expert there is no alpha, and routers are averaged by examples.
    """

    def aggregate(updates: Iterable[Update], shared: Tree) -> dict[str, torch.Tensor]:
        experts: set[Expert] = set()
        sum_of_weights: dict[str, float] = {}

        def read(update: Update) -> Update:
            experts.update(e for e in map(expert_of, update.delta) if e is not None)
            for name, weight in update.weight.items():
                if is_router(name):
                    sum_of_weights[name] = sum_of_weights.get(name, 0.0) + weight
            return update

        delta = mean(map(read, updates))
        if not experts:
            return delta
        for name, total in sum_of_weights.items():
            alpha = total / len(experts)
            moved = alpha * delta[name]
            delta[name] = moved if kind == "damped" else moved + (alpha - 1) * shared[name].float()
        return delta

    return aggregate
