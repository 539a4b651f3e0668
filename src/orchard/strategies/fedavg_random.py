"""FedAvg with random experts dropped: the control for every choice of experts by their worth.

In each round a client trains as many random experts as it affords, among those that its data
uses, and sends all experts, trained or not.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.strategies.expert_names import expert_of, router_row_of
from orchard.strategies.session import SubsetSettings
from orchard.strategies.strategy import Contribution, Strategy, Trained
from orchard.strategies.subset import with_subset


def fedavg_random(strategy: Strategy, subset: SubsetSettings) -> Strategy:
    """Let every client of ``strategy`` train random experts, drawn anew in each round."""

    def weigh(client: Client, task: Task, trained: Trained) -> Contribution:
        # A client that loaded its experts alone sends the others too: unchanged.
        others = {
            name: torch.zeros_like(value, dtype=torch.float32)
            for name, value in task.shared.items()
            if (expert_of(name) or router_row_of(name)) and name not in trained.delta
        }
        return strategy.weigh(client, task, replace(trained, delta={**trained.delta, **others}))

    chosen = with_subset(strategy, replace(subset, rank_by="random", cadence="round"))
    return replace(chosen, weigh=weigh)
