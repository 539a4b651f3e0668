"""How many experts each layer grafts, given one budget for all layers.

Every layer has, for each number of experts, the share of its output that they leave out. The sum
of these shares is made as small as the budget allows, exactly, by dynamic programming: the best of
the first layers with so many grafts, and then one layer more.

Source: none; FLEx (Liu et al., 2025, arXiv:2506.00965) grafts as many experts in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def allocate(losses: Sequence[Mapping[int, float]], *, budget: int) -> tuple[int, ...]:
    """Return how many experts each layer gets, so that the sum of losses is the smallest.

    Of equals, fewer grafts win, and then fewer in the later layers.

    Args:
        losses: For each layer, number of experts to loss. More experts need not lose less.
        budget: At most so many, over all layers.

    Raises:
        ValueError: The budget does not pay for the smallest number of every layer.
    """
    smallest = sum(min(own) for own in losses)
    if budget < smallest:
        raise ValueError(
            f"strategy.graft_budget must be at least {smallest}, got {budget}; "
            "every MoE layer has a graft"
        )
    # best[n]: the smallest loss of the layers so far with exactly n grafts, and their numbers.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for own in losses:
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for number, loss in sorted(own.items()):
            for spent, (total, numbers) in best.items():
                now = spent + number
                if now <= budget and total + loss < following.get(now, (math.inf, ()))[0]:
                    following[now] = (total + loss, (*numbers, number))
        best = following
    _, numbers = min(((total, spent), numbers) for spent, (total, numbers) in best.items())
    return numbers
