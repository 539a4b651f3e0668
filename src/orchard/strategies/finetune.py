"""Fine-tuning: in the last rounds every client trains the shared model for itself.

The reference for personalization that costs nothing to think of, as in Yu et al., 2020,
arXiv:2002.04758: federate, then let each client train what came of it on its own data. The last
rounds send nothing and average nothing; all that would be sent is kept.
"""

from __future__ import annotations

from dataclasses import replace

from orchard.strategies.late_rounds import changed_after
from orchard.strategies.strategy import Plan, Strategy


def finetune(strategy: Strategy, *, after_round: int) -> Strategy:
    """Let the clients of ``strategy`` keep what they train after a round.

    Args:
        strategy: What the rounds before are.
        after_round: The last round of the federation.
    """

    def keep_all(plan: Plan) -> Plan:
        return replace(
            plan,
            shared=(),
            personal=(*plan.shared, *plan.personal),
            from_global=plan.from_global | frozenset(plan.shared),
        )

    return changed_after(strategy, after_round, keep_all)
