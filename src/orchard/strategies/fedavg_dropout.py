"""FedAvg in which a client that cannot afford to train all experts drops out of the round.

What HFedMoE (Fang et al., 2026, arXiv:2601.00583) is up against where devices are small: training
fails on them, and what their data could have taught is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.results import Metrics
from orchard.strategies.strategy import Plan, Strategy


def fedavg_dropout(strategy: Strategy) -> Strategy:
    """Let the clients of ``strategy`` with a budget below all experts drop out."""

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        num_experts = sum(layer.num_experts for layer in client.model.view.layers)
        drops_out = client.budget_experts is not None and client.budget_experts < num_experts
        with strategy.prepare(client, task) as plan:

            def measure() -> Metrics:
                return {**plan.measure(), "client/dropped_out": 0.0}

            yield replace(plan, drops_out=drops_out, measure=measure)

    return replace(strategy, prepare=prepare)
