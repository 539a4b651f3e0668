"""Fine-tuning: in the last rounds every client trains the shared model for itself.

The reference for personalization that costs nothing to think of, as in Yu et al., 2020,
arXiv:2002.04758: federate, then let each client train what came of it on its own data. The last
rounds send nothing and average nothing; all that would be sent is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.strategies.strategy import Plan, Strategy


def finetune(strategy: Strategy, *, after_round: int) -> Strategy:
    """Let the clients of ``strategy`` keep what they train after a round.

    Args:
        strategy: What the rounds before are.
        after_round: The last round of the federation.
    """

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with strategy.prepare(client, task) as plan:
            if task.round_number > after_round:
                plan = replace(
                    plan,
                    shared=(),
                    personal=(*plan.shared, *plan.personal),
                    from_global=plan.from_global | frozenset(plan.shared),
                )
            yield plan

    return replace(strategy, prepare=prepare)
