"""Ditto: Fair and Robust Federated Learning Through Personalization.

Li et al., 2021, arXiv:2012.04221. In words:

1. Clients train and send the shared model as before.
2. Beside it, each trains a model of its own on the same data, as many steps, which is pulled to the
   global values that it was sent: its loss plus lambda / 2 times the squared distance.
3. That model stays with the client, and is its personal one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from orchard.client.client import Client
from orchard.client.objectives import pulled
from orchard.communication.messages import Task
from orchard.strategies.strategy import OwnPart, Plan, Strategy


def ditto(strategy: Strategy, *, strength: float) -> Strategy:
    """Give every client of ``strategy`` a model of its own beside the shared one."""

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with strategy.prepare(client, task) as plan:

            @contextmanager
            def own() -> Iterator[OwnPart]:
                yield OwnPart(plan.shared, client.train, objective=pulled(strength=strength))

            yield replace(plan, own=own)

    return replace(strategy, prepare=prepare)
