"""SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts.

Muzio, Sun and He, 2024, arXiv:2404.05089: not a federated method, and here FedAvg of clients that
prune. In words:

1. Once, a client counts how often its tokens choose each expert and keeps the heavy hitters, as
   many as it affords.
2. It fine-tunes those and everything that is no expert. Its loss has the entropy of the routing
   probabilities added, so that routers learn to decide for few experts.
3. It sends what it trained; the server averages each expert over the clients that kept it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean

import torch

from orchard.client.client import Client
from orchard.client.objectives import Objective, Situation
from orchard.communication.messages import Task
from orchard.experts.observation import LayerPass, watch_routing
from orchard.results import Metrics
from orchard.strategies.expert_names import expert_of
from orchard.strategies.session import SubsetSettings
from orchard.strategies.strategy import Contribution, Plan, Strategy, Trained
from orchard.strategies.subset import layer_values, marked, send_only, with_subset

_ENTROPY = "router_entropy"
_TINY = torch.finfo(torch.float32).tiny


def routing_entropy(layers: tuple[LayerPass, ...]) -> torch.Tensor:
    """Return the entropy of routing probabilities in nats, mean over tokens and layers, scalar."""
    entropies = []
    for layer in layers:
        p_TE = layer.probabilities_TE
        # 0 log 0 counts 0, with a finite gradient.
        entropies.append(-(p_TE * p_TE.clamp_min(_TINY).log()).sum(dim=-1).mean())
    return torch.stack(entropies).mean()


def seermoe(strategy: Strategy, subset: SubsetSettings, *, entropy_coefficient: float) -> Strategy:
    """Let every client of ``strategy`` prune experts, then train with sharper routers.

    Args:
        strategy: Whose clients prune.
        subset: How experts are chosen, but for what they are ranked by and how often.
        entropy_coefficient: Weight of the routing entropy beside the task loss, at least 0.
    """
    pruned = with_subset(strategy, replace(subset, rank_by="frequency", cadence="run"))

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with pruned.prepare(client, task) as plan:
            model = plan.model or client.model
            seen: list[torch.Tensor] = []
            num_tokens: list[int] = []

            def see(layers: tuple[LayerPass, ...]) -> None:
                if model.model.training:
                    seen.append(routing_entropy(layers))
                    num_tokens.append(len(layers[0].sample_T))

            def watch() -> dict[str, torch.Tensor]:
                live = seen[-1]
                seen[-1] = live.detach()
                return {**plan.watch(), _ENTROPY: live}

            def measure() -> Metrics:
                return {
                    **plan.measure(),
                    "client/router_entropy": fmean(map(float, seen), num_tokens),
                }

            with watch_routing(model.view, see, keep_graph=True):
                yield replace(plan, watch=watch, measure=measure)

    def weigh(client: Client, task: Task, trained: Trained) -> Contribution:
        kept = {None, *marked(layer_values(trained.plan.memory, "subset"))}
        return send_only(strategy.weigh(client, task, trained), lambda n: expert_of(n) in kept)

    objective = _with_entropy(strategy.objective, entropy_coefficient)
    return replace(pruned, prepare=prepare, objective=objective, weigh=weigh)


def _with_entropy(inner: Objective, coefficient: float) -> Objective:
    def objective(situation: Situation) -> torch.Tensor:
        entropy = situation.watched[_ENTROPY]
        return inner(situation) + situation.share * coefficient * entropy

    return objective
