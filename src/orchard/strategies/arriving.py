"""Clients that arrive after training: they get the shared model as it is, and move none of it.

In the rounds that follow the others' last one, an arriving client chooses its graft on its own rows
and trains what it keeps; nothing is sent and the global tree stays. Where a method keeps nothing,
as FedAvg, the client's personal model is the global one, and it trains nothing.
"""

from __future__ import annotations

from dataclasses import replace

from orchard.strategies.late_rounds import changed_after
from orchard.strategies.strategy import Plan, Strategy


def arriving(strategy: Strategy, *, after_round: int) -> Strategy:
    """Let whoever trains after a round keep what it trains and send nothing.

    Args:
        strategy: What the rounds before are.
        after_round: The last round of the federation.
    """

    def keep(plan: Plan) -> Plan:
        is_idle = not plan.personal and plan.own is None
        return replace(plan, shared=(), drops_out=plan.drops_out or is_idle)

    return changed_after(strategy, after_round, keep)
