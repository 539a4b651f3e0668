"""FedAvgM, FedAdagrad, FedAdam and FedYogi: FedAvg with another server optimizer.

Hsu et al., 2019, arXiv:1909.06335 (FedAvgM). Reddi et al., 2021, arXiv:2003.00295 (the others).
Minus the mean delta of a round is the pseudo-gradient; only what was sent reaches the optimizer, so
personal tensors are never averaged, whichever optimizer it is.
"""

from __future__ import annotations

from dataclasses import replace

from orchard.server.optimizers import SGD, Adaptive
from orchard.strategies.strategy import Strategy


def fedavgm(strategy: Strategy, *, lr: float, momentum: float, dampening: float) -> Strategy:
    """Give the server of ``strategy`` momentum."""
    return replace(strategy, optimizer=SGD(lr=lr, momentum=momentum, dampening=dampening))


def adaptive(
    strategy: Strategy, *, rule: str, lr: float, beta1: float, beta2: float, tau: float
) -> Strategy:
    """Give the server of ``strategy`` a step per coordinate, by ``rule``; see ``Adaptive``."""
    return replace(
        strategy, optimizer=Adaptive(rule=rule, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    )
