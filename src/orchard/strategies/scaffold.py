"""SCAFFOLD: Stochastic Controlled Averaging for Federated Learning.

Karimireddy et al., 2020, arXiv:1910.06378. In words:

1. The server holds a control variate c, each client its own c_i, all zero at first.
2. A client descends the gradient of its loss plus c - c_i, which takes out the drift of its data.
3. It sends its delta and how its control variate changed; c_i stays on its disk.
4. The server averages the deltas, and moves c by the mean change times the share of clients that
   took part.

The correction is a linear term of the loss, so it works under any local optimizer. The new c_i is
the mean of the client's own gradients along its way. Under plain SGD without clipping that equals
the paper's option II, c_i - c + (x - y_i) / (steps * lr); under AdamW that formula would mix step
lengths with gradients, and ours does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from orchard.client.client import Client
from orchard.client.objectives import Objective, Situation
from orchard.communication.messages import Task
from orchard.server.optimizers import ServerOptimizer, Slots, check_names
from orchard.strategies.strategy import Contribution, Plan, Strategy, Trained
from orchard.trees import Tree, zeros_like

_CONTROL = "control."


@dataclass(frozen=True)
class WithControl:
    """A server optimizer that also carries the server's control variate.

    Attributes:
        inner: Moves the values.
        participation: Clients per round over all clients, in (0, 1].
    """

    inner: ServerOptimizer
    participation: float

    def start(self, adapters: Tree) -> tuple[Tree, Slots]:
        """Begin with a control variate of zero beside every value."""
        shared, slots = self.inner.start(adapters)
        zeros = {_CONTROL + name: zero for name, zero in zeros_like(shared).items()}
        return {**shared, **zeros}, slots

    def step(self, shared: Tree, delta: Tree, slots: Slots) -> tuple[Tree, Slots]:
        """Move the values by the inner optimizer, the control variate by participation * delta."""
        check_names(shared, delta)
        values = {n: t for n, t in shared.items() if not n.startswith(_CONTROL)}
        moves = {n: t for n, t in delta.items() if not n.startswith(_CONTROL)}
        moved, slots = self.inner.step(values, moves, slots)
        controls = {
            name: tensor + self.participation * delta[name] if name in delta else tensor
            for name, tensor in shared.items()
            if name.startswith(_CONTROL)
        }
        return {**moved, **controls}, slots


def _corrected(inner: Objective) -> Objective:
    def objective(situation: Situation) -> torch.Tensor:
        products = []
        for name, parameter in situation.shared.items():
            key = _CONTROL + name
            drift = situation.broadcast[key] - situation.memory[key]
            products.append((drift.to(parameter.device) * parameter).sum())
        correction = torch.stack(products).sum()
        return inner(situation) + situation.share * correction

    return objective


def scaffold(strategy: Strategy, *, participation: float) -> Strategy:
    """Correct the drift of the clients of ``strategy``.

    Args:
        strategy: Whose shared tensors get control variates; personal ones have none.
        participation: Clients per round over all clients, in (0, 1].
    """

    @contextmanager
    def prepare(client: Client, task: Task) -> Iterator[Plan]:
        kept = client.store.load(before_round=task.round_number)
        with strategy.prepare(client, task) as plan:
            names = [_CONTROL + name for name in plan.shared]
            own = {} if kept is None else kept.tensors
            controls = {
                name: own[name] if name in own else torch.zeros_like(task.shared[name])
                for name in names
            }
            yield replace(plan, memory={**plan.memory, **controls}, keep_mean_gradient=True)

    def weigh(client: Client, task: Task, trained: Trained) -> Contribution:
        sent = strategy.weigh(client, task, trained)
        assert trained.report.mean_gradient is not None
        controls, changes = {}, {}
        for name, gradient in trained.report.mean_gradient.items():
            key = _CONTROL + name
            own = trained.plan.memory[key]
            # The objective's gradient is the client's own plus c - c_i.
            controls[key] = gradient.cpu() - task.shared[key] + own
            changes[key] = controls[key] - own
        return Contribution(
            delta={**sent.delta, **changes},
            weight={**sent.weight, **dict.fromkeys(changes, 1.0)},
            memory={**sent.memory, **controls},
        )

    return replace(
        strategy,
        prepare=prepare,
        objective=_corrected(strategy.objective),
        weigh=weigh,
        optimizer=WithControl(strategy.optimizer, participation),
    )
