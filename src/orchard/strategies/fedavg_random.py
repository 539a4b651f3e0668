"""FedAvg with random experts dropped: the control for every choice of experts by their worth.

In each round a client trains as many random experts as it affords, among those that its data
uses, and sends all experts, trained or not.
"""

from __future__ import annotations

from dataclasses import replace

from orchard.strategies.session import SubsetSettings
from orchard.strategies.strategy import Strategy
from orchard.strategies.subset import with_subset


def fedavg_random(strategy: Strategy, subset: SubsetSettings) -> Strategy:
    """Let every client of ``strategy`` train random experts, drawn anew in each round."""
    return with_subset(strategy, replace(subset, rank_by="random", cadence="round"))
