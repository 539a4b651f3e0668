"""Whether a round's new global tree may be committed: a checkpoint with NaN ends a run for good."""

from __future__ import annotations

import math

from orchard.server.checkpoint import ServerState
from orchard.trees import squared_norm, subtract

DEFAULT_RATIO = 100.0
"""By default a round moves the tree by at most so many times the longest of 1, the norm of the tree
before, and the norm of the longest update, where updates are held to a median: far beyond what any
optimizer here does, and far from where float32 ends."""


class PoisonedError(ValueError):
    """A global tree that must not be committed; its message says why."""


def check_move(
    before: ServerState, after: ServerState, *, longest: float, max_move: float = 0.0
) -> None:
    """Check the state after a round, before it becomes a checkpoint.

    Args:
        before: The state that the round began with.
        after: What its updates made of it.
        longest: L2 norm of the longest update; 0 = nothing bounds it.
        max_move: Largest L2 norm of the difference; 0 = ``DEFAULT_RATIO`` times what is there.

    Raises:
        PoisonedError: A value of tree or slots is not finite, a name or shape is new, or the tree
            moved too far.
    """
    for kind, tree in {"global tree": after.shared, **after.slots}.items():
        for name, tensor in tree.items():
            # Squares in float64 are finite for any float32; NaN and infinity stay what they are.
            if tensor.is_floating_point() and not math.isfinite(float(tensor.double().sum())):
                raise PoisonedError(f"{name} of the {kind} must be finite, got NaN or infinity")
    changed = {
        name: tensor
        for name, tensor in after.shared.items()
        if tensor is not before.shared.get(name)
    }
    for name, tensor in changed.items():
        if name not in before.shared or tensor.shape != before.shared[name].shape:
            raise PoisonedError(f"{name} must be a tensor of the tree before, got another")
    move = math.sqrt(squared_norm(subtract(changed, before.shared)))
    bound = max_move or DEFAULT_RATIO * max(1.0, math.sqrt(squared_norm(before.shared)), longest)
    if not move <= bound:
        raise PoisonedError(
            f"a round must move the global tree by at most {bound:g}, got {move:g}; if its updates "
            "are right, raise deployment.max_move"
        )
