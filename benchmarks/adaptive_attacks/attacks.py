"""What two of ten clients send who know all honest updates and the rule that aggregates them.

An attacker that adapts tries each strength of its attack on the rule itself, and sends the one that
does what it wants most. It says that it has as many examples as the default bounds let count.

Source: Baruch et al., 2019, arXiv:1902.06156 (a little is enough); Xie et al., 2020,
arXiv:1903.03936 (inner-product manipulation); Bagdasaryan et al., 2020, arXiv:1807.00459 (a boosted
backdoor). The strengths there are fixed; here they are chosen round by round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median_low
from typing import Any, TypeAlias

import torch
from torch import Tensor

from orchard.communication.messages import Update
from orchard.server.beside import ACCEPTED_RATIO

Delta: TypeAlias = dict[str, Tensor]
Rule: TypeAlias = Callable[[Sequence[Update]], Delta]
ATTACKS = ("none", "scaled", "flipped", "little", "inner_product", "one_expert", "backdoor")
ADAPTIVE = ATTACKS[3:]
_STRENGTHS = {
    "little": (0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0),
    "inner_product": (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    "one_expert": (0.5, 1.0, 2.0, 4.0, 8.0),
    "backdoor": (1.0, 2.0, 4.0, 8.0, 16.0),
}


def mean_of(updates: Sequence[Update]) -> Delta:
    """Return the plain mean of updates, name by name."""
    names = updates[0].delta
    return {name: torch.stack([u.delta[name] for u in updates]).mean(dim=0) for name in names}


def inner(left: Delta, right: Delta) -> float:
    """Return the inner product of two trees."""
    return math.fsum(float((left[n].double() * right[n].double()).sum()) for n in left)


def attacked(
    attack: str, honest: Sequence[Update], own: Sequence[Update], rule: Rule
) -> tuple[list[Update], float]:
    """Return what the hostile clients send, and the strength that they chose.

    Args:
        attack: Of ``ATTACKS``.
        honest: The updates of the others.
        own: What the hostile clients trained.
        rule: The aggregation in use, with its bounds.
    """
    if attack == "none":
        return list(own), 0.0
    if attack in ("scaled", "flipped"):
        factor = 20.0 if attack == "scaled" else -5.0
        scaled = [{n: factor * t for n, t in update.delta.items()} for update in own]
        return [replace(u, delta=d) for u, d in zip(own, scaled, strict=True)], factor

    def gain(strength: float) -> float:
        made = rule([*honest, *sent_at(attack, strength, honest, own)])
        return gain_of(attack, made, honest, own)

    best = max(strengths_of(attack), key=gain)
    return sent_at(attack, best, honest, own), best


def strengths_of(attack: str) -> tuple[float, ...]:
    """Return the strengths that an adapting attacker tries."""
    return _STRENGTHS[attack]


def sent_at(
    attack: str, strength: float, honest: Sequence[Update], own: Sequence[Update]
) -> list[Update]:
    """Return what the hostile clients send at one strength of an adaptive attack."""
    weight = ACCEPTED_RATIO * median_low([max(u.weight.values()) for u in honest])
    delta = _made(attack, strength, honest, own, mean_of(honest))
    return [replace(u, delta=delta, weight=dict.fromkeys(delta, weight)) for u in own]


def gain_of(attack: str, made: Delta, honest: Sequence[Update], own: Sequence[Update]) -> float:
    """Return how much of what an attacker wants is in an aggregate.

    Inner-product manipulation wants the aggregate against the honest mean, a backdoor wants it
    where its own training went, and the others want it far from the honest mean.
    """
    middle = mean_of(honest)
    if attack == "inner_product":
        return -inner(made, middle)
    moves = {name: made[name] - middle[name] for name in middle}
    if attack == "backdoor":
        wanted = mean_of(own)
        return inner(moves, {name: wanted[name] - middle[name] for name in middle})
    return inner(moves, moves)


def _made(
    attack: str, strength: float, honest: Sequence[Update], own: Sequence[Update], middle: Delta
) -> Delta:
    if attack == "little":
        spread = {n: torch.stack([u.delta[n] for u in honest]).std(dim=0) for n in middle}
        return {name: middle[name] - strength * spread[name] for name in middle}
    if attack == "inner_product":
        return {name: -strength * tensor for name, tensor in middle.items()}
    if attack == "backdoor":
        wanted = mean_of(own)
        return {name: middle[name] + strength * (wanted[name] - middle[name]) for name in middle}
    expert = min(expert_of(name) for name in middle if expert_of(name))
    part = {name: t for name, t in middle.items() if expert_of(name) == expert}
    scale = strength * math.sqrt(inner(middle, middle) / max(inner(part, part), 1e-30))
    return {**middle, **{name: -scale * tensor for name, tensor in part.items()}}


def expert_of(name: str) -> str:
    """Return the expert that a name belongs to; empty where it belongs to none."""
    layer, is_expert, rest = name.partition(".experts.")
    return f"{layer}.experts.{rest.partition('.')[0]}" if is_expert else ""


def displaced(made: Delta, honest: Sequence[Update]) -> dict[str, float]:
    """Return how far each name is from the honest mean, in honest standard deviations.

    The standard deviation of a name is the root mean square of the L2 distances of the honest
    updates to their mean.
    """
    middle = mean_of(honest)
    found = {}
    for name, center in middle.items():
        squares = [float((u.delta[name] - center).double().square().sum()) for u in honest]
        spread = math.sqrt(math.fsum(squares) / len(squares))
        distance = float((made.get(name, torch.zeros(())) - center).double().norm())
        if spread > 0:
            found[name] = distance / spread
    return found


def kind_of(name: str) -> str:
    """Return what a name belongs to: experts, routers or attention."""
    if expert_of(name):
        return "experts"
    return "routers" if ".router." in name else "attention"


def moved(seen: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return how far an attack moved names and experts, over all rounds.

    An expert is as far as the farthest of its names. A share is of those that honest clients
    trained in the same round, so that it is never above 1.

    Args:
        seen: ``displaced`` of each round.
    """
    names = [value for found in seen for value in found.values()]
    rounds: list[dict[str, float]] = []
    kinds: dict[str, float] = {}
    for found in seen:
        farthest: dict[str, float] = {}
        for name, value in found.items():
            kinds[kind_of(name)] = max(kinds.get(kind_of(name), 0.0), value)
            if expert := expert_of(name):
                farthest[expert] = max(farthest.get(expert, 0.0), value)
        rounds.append(farthest)
    experts = [value for farthest in rounds for value in farthest.values()]
    worst = {
        expert: max(farthest.get(expert, 0.0) for farthest in rounds)
        for expert in sorted({expert for farthest in rounds for expert in farthest})
    }
    return {
        "names_moved": sum(value > 1 for value in names) / len(names),
        "experts_moved": sum(value > 1 for value in experts) / max(len(experts), 1),
        "worst_name": max((value, name) for found in seen for name, value in found.items())[1],
        "worst_distance": max(names),
        "kinds": kinds,
        "experts": {expert: round(value, 3) for expert, value in worst.items()},
    }
