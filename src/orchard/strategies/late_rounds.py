"""A method whose clients do something else after a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.strategies.strategy import Plan, Strategy


def changed_after(
    strategy: Strategy, round_number: int, change: Callable[[Plan], Plan]
) -> Strategy:
    """Return a method whose plans are changed in the rounds after one.

    Args:
        strategy: What the rounds up to it are.
        round_number: The last of these.
        change: From what a client would do to what it does.
    """

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with strategy.prepare(client, task) as plan:
            yield change(plan) if task.round_number > round_number else plan

    return replace(strategy, prepare=prepare)
