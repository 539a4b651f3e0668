"""PFL-MoE: Personalized Federated Learning Based on Mixture of Experts, as HFedMoE describes it.

Guo et al., 2020, arXiv:2012.15589; HFedMoE (Fang et al., 2026, arXiv:2601.00583) compares with a
reading of it for MoE language models. In words:

1. In each round a client trains the experts that its data uses most, as many as it affords.
2. It sends those experts, and everything that is no expert.
3. The server averages each expert over the clients that sent it, and routers as all else: by
   examples, whatever experts they were trained beside.
"""

from __future__ import annotations

from dataclasses import replace

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.strategies.expert_names import expert_of
from orchard.strategies.session import SubsetSettings
from orchard.strategies.strategy import Contribution, Strategy, Trained
from orchard.strategies.subset import layer_values, marked, send_only, with_subset


def pflmoe(strategy: Strategy, subset: SubsetSettings) -> Strategy:
    """Let every client of ``strategy`` train and send the experts that it uses most."""

    def weigh(client: Client, task: Task, trained: Trained) -> Contribution:
        own = {None, *marked(layer_values(trained.observed, "trained"))}
        return send_only(strategy.weigh(client, task, trained), lambda n: expert_of(n) in own)

    chosen = with_subset(strategy, replace(subset, rank_by="frequency", cadence="round"))
    return replace(chosen, weigh=weigh)
