"""FedProx: Federated Optimization in Heterogeneous Networks.

Li et al., 2020, arXiv:1812.06127. FedAvg in which every client minimizes its loss plus
mu / 2 times the squared distance of the shared tensors from their global values.
"""

from __future__ import annotations

from dataclasses import replace

from orchard.client.objectives import proximal
from orchard.strategies.strategy import Strategy


def fedprox(strategy: Strategy, *, mu: float) -> Strategy:
    """Pull the clients of ``strategy`` towards the global tree with strength ``mu``."""
    return replace(strategy, objective=proximal(strategy.objective, mu=mu))
