"""Local: every client trains alone.

The reference that a federation has to beat: nothing is sent, nothing is averaged. Whatever the
inner strategy would share becomes personal, and there is no global tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from orchard.client.client import Client
from orchard.communication.messages import Task
from orchard.server.optimizers import Slots
from orchard.strategies.strategy import Plan, Strategy
from orchard.trees import Tree


@dataclass(frozen=True)
class NoGlobalTree:
    """The optimizer of a server that holds nothing."""

    def start(self, adapters: Tree) -> tuple[Tree, Slots]:
        """Begin, and stay, empty."""
        return {}, {}

    def step(self, shared: Tree, delta: Tree, slots: Slots) -> tuple[Tree, Slots]:
        """Return the empty tree; there is nothing to move."""
        return shared, slots


def local(strategy: Strategy) -> Strategy:
    """Let every client of ``strategy`` keep all that it trains."""

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        with strategy.prepare(client, task) as plan:
            yield replace(plan, shared=(), personal=(*plan.shared, *plan.personal))

    return replace(strategy, prepare=prepare, optimizer=NoGlobalTree())
