"""How the global tree moves, given the mean delta of a round.

Reddi et al., "Adaptive Federated Optimization" (2021, arXiv 2003.00295), Algorithm 2: the server
takes minus the mean delta as its pseudo-gradient. A name without a delta keeps its value and its
slots. Slots are trees of their own, so that they are saved beside the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from orchard.trees import Tree, zeros_like

Slots = Mapping[str, Tree]


class ServerOptimizer(Protocol):
    """Where the global tree begins, and one step of it."""

    def start(self, adapters: Tree) -> tuple[Tree, Slots]:
        """Return the global tree of round 0 and the slots, from the fresh adapters."""

    def step(self, shared: Tree, delta: Tree, slots: Slots) -> tuple[Tree, Slots]:
        """Return the next global tree and slots.

        Args:
            shared: The global values.
            delta: Weighted mean delta, local minus global, of the names that were sent, in the
                dtype of ``shared``. It is given away: its memory may become that of the result.
            slots: Slot name to tree.

        Raises:
            ValueError: ``delta`` has a name that is not in ``shared``.
        """


def check_names(shared: Tree, delta: Tree) -> None:
    """Refuse a delta for a name that the global tree does not have.

    Raises:
        ValueError: See above.
    """
    unknown = sorted(delta.keys() - shared.keys())
    if unknown:
        raise ValueError(
            f"update must hold names of the global tree, got {unknown[0]}; "
            "check that the client runs the same recipe"
        )


@dataclass(frozen=True)
class SGD:
    """Step along the mean delta, with momentum if asked for.

    With ``lr`` 1 and no momentum this is FedAvg. Momentum is FedAvgM (Hsu et al., 2019,
    arXiv 1909.06335): m = momentum * m + dampening * delta, where the first m is delta itself.

    Attributes:
        lr: Server learning rate.
        momentum: Share of the last m that is kept, in [0, 1).
        dampening: What the new delta counts. FLEx's code uses 1 - momentum, so that m is an
            average; the paper of FedAvgM uses 1.
    """

    lr: float = 1.0
    momentum: float = 0.0
    dampening: float = 1.0

    def start(self, adapters: Tree) -> tuple[Tree, Slots]:
        """Begin with the adapters and no momentum."""
        return dict(adapters), {}

    def step(self, shared: Tree, delta: Tree, slots: Slots) -> tuple[Tree, Slots]:
        """Return shared + lr * m."""
        check_names(shared, delta)
        if self.momentum == 0.0:
            for name, change in delta.items():
                change.mul_(self.lr).add_(shared[name])
            return {**shared, **delta}, slots
        old = slots.get("momentum", {})
        new, moved = dict(old), dict(shared)
        for name, change in delta.items():
            if name in old:
                change.mul_(self.dampening).add_(self.momentum * old[name])
            new[name] = change
            moved[name] = shared[name] + self.lr * change
        return moved, {"momentum": new}


@dataclass(frozen=True)
class Adaptive:
    """FedAdagrad, FedAdam and FedYogi: a step per coordinate.

    m = beta1 * m + (1 - beta1) * delta, then shared + lr * m / (sqrt(v) + tau), where v starts at
    tau^2 and follows ``rule``. There is no bias correction.

    Source: Reddi et al., 2021, arXiv 2003.00295, Algorithm 2. For FedAdagrad beta1 is 0 there;
    set it so. OpenFedLLM, which FLEx's code builds on, differs in FedAdam and FedYogi: its first m
    is the first delta itself, not (1 - beta1) times it, and its v follows the square of m.

    Attributes:
        rule: ``adagrad``, ``adam`` or ``yogi``.
        lr: Server learning rate (eta).
        beta1: Momentum, in [0, 1).
        beta2: Memory of v, in [0, 1); unused by adagrad.
        tau: Adaptivity; the smaller, the more equal the steps of all coordinates.
    """

    rule: str
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def start(self, adapters: Tree) -> tuple[Tree, Slots]:
        """Begin with the adapters, m = 0 and v = tau^2."""
        first = zeros_like(adapters)
        second = {name: torch.full_like(zero, self.tau**2) for name, zero in first.items()}
        return dict(adapters), {"first_moment": first, "second_moment": second}

    def step(self, shared: Tree, delta: Tree, slots: Slots) -> tuple[Tree, Slots]:
        """Return the next values and moments."""
        check_names(shared, delta)
        first, second = dict(slots["first_moment"]), dict(slots["second_moment"])
        moved = dict(shared)
        for name, change in delta.items():
            square = change.square()
            first[name] = self.beta1 * first[name] + (1 - self.beta1) * change
            if self.rule == "adagrad":
                second[name] = second[name] + square
            elif self.rule == "adam":
                second[name] = self.beta2 * second[name] + (1 - self.beta2) * square
            else:
                sign = torch.sign(second[name] - square)
                second[name] = second[name] - (1 - self.beta2) * square * sign
            moved[name] = shared[name] + self.lr * first[name] / (second[name].sqrt() + self.tau)
        return moved, {"first_moment": first, "second_moment": second}
