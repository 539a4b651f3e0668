"""What clients measure of their own rounds, by name: who sends another one is refused.

Names end in tables and charts, and stay for ever. A method of one's own measures what it likes, so
its runs take names by their shape.
"""

from __future__ import annotations

import re

OF_NO_LAYER = frozenset(
    {
        # Of any method.
        *("num_examples", "prepare_seconds", "train_loss", "train_seconds", "num_tokens"),
        *("num_steps", "evaluation_seconds", "dropped_out"),
        # Of what a client trains apart.
        *("own_train_loss", "own_train_seconds", "own_num_steps", "own_share", "own_is_trusted"),
        *("own_judged_loss", "shared_judged_loss"),
        # Of methods with budgets.
        *("budget_experts", "active_experts", "active_share", "trained_experts", "preference"),
        "router_entropy",
    }
)
"""Names after ``client/``."""
OF_LAYERS = (
    *("active_share", "gate_mean", "graft_expert", "graft_output_norm"),
    *("graft_loss", "graft_loss_bound", "graft_loss_none", "graft_loss_second"),
)
"""Names after ``client/`` that a layer's name follows, after an underscore."""

_LAYER = r"(?=.*\d)[a-z][\w.-]{0,119}"
_FIXED = "|".join(sorted(OF_NO_LAYER))
KNOWN = re.compile(rf"client/(?:{_FIXED})|local/[a-z_]{{1,48}}", re.ASCII)
KNOWN_OF_LAYERS = re.compile(rf"client/(?:{'|'.join(OF_LAYERS)})_{_LAYER}", re.ASCII)
SHAPED = re.compile(r"client/[a-z][a-z_]{0,47}|local/[a-z_]{1,48}", re.ASCII)
SHAPED_OF_LAYERS = re.compile(r"client/(?=.*\d)[a-z][\w.-]{0,159}", re.ASCII)
