"""What attackers make of messages and models: a category, membership, a planted secret's rank.

Source: Yeom et al., 2018, arXiv:1709.01604 (membership by the loss), here less the base's loss of
the same row (Carlini et al., 2021, arXiv:2012.07805); Shokri et al., 2017, arXiv:1610.05820 (a
classifier trained on shadow clients); Carlini et al., 2019, arXiv:1802.08232 (exposure).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]


def classify(shadow_CM: Reals, labels: Sequence[str], seen_CM: Reals) -> list[str]:
    """Return the category of each client, by ridge regression on what shadow clients sent.

    Args:
        shadow_CM: A vector for each shadow client, of any length.
        labels: Their categories.
        seen_CM: What the attacked clients sent.
    """
    middle = shadow_CM.mean(axis=0)
    shadow, seen = (_directions(values - middle) for values in (shadow_CM, seen_CM))
    kinds = sorted(set(labels))
    wanted = np.array([[1.0 if label == kind else 0.0 for kind in kinds] for label in labels])
    products = shadow @ shadow.T
    weights = np.linalg.solve(products + 0.1 * np.eye(len(products)), wanted - 1 / len(kinds))
    return [kinds[index] for index in ((seen @ shadow.T) @ weights).argmax(axis=1)]


def _directions(values: Reals) -> Reals:
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms == 0, 1.0, norms)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, 1927)."""
    z, share = 1.96, hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    half /= 1 + z * z / total
    return middle - half, middle + half


def auc(members: Reals, others: Reals) -> float:
    """Return how often a member scores above another row, ties counted half."""
    above = (members[:, None] > others[None]).mean()
    return float(above + 0.5 * (members[:, None] == others[None]).mean())


def true_positives(members: Reals, others: Reals, *, false_positives: float = 0.01) -> float:
    """Return the share of members above the score that at most so many other rows exceed."""
    ordered = np.sort(others)[::-1]
    allowed = math.floor(false_positives * len(others))
    return float((members > ordered[allowed]).mean())


def exposure(secret: float, rivals: Sequence[float]) -> float:
    """Return log2 of the number of secrets over the rank of the planted one: 0 is the last rank.

    Args:
        secret: Its score, higher for what a model rather says.
        rivals: Those of the others.
    """
    rank = 1 + sum(rival >= secret for rival in rivals)
    return math.log2(1 + len(rivals)) - math.log2(rank)


def bootstrap(
    groups: Sequence[Reals], statistic: object, *, draws: int = 1000
) -> tuple[float, ...]:
    """Return the 95 % interval of a statistic over rows drawn anew in each group.

    Args:
        groups: Arrays that are drawn from, each by itself.
        statistic: Takes the groups.
        draws: How often.
    """
    assert callable(statistic)
    generator = np.random.default_rng(0)
    values = [
        statistic(*(group[generator.integers(len(group), size=len(group))] for group in groups))
        for _ in range(draws)
    ]
    return tuple(float(v) for v in np.percentile(values, (2.5, 97.5)))
