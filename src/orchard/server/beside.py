"""What an update may be beside the others of its round, and what it may weigh.

An update that passes ``admission.py`` is well formed. Whether it is too long, or counts too much,
can be told from the others alone: the longest honest update of a round is a few times its median,
and nobody's data is worth more than the owner of the run accepts.

Two are too few to say which of them is the odd one: below three, a round's median is that of
earlier rounds, and where there is none, nothing is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

ACCEPTED_RATIO = 3.0
"""Times the median that one site counts for at most, by default: of the sites' examples, and of
examples times norm. Of three equal sites, one then moves a mean by at most one and a half times the
longest honest update; sites whose sizes differ more are for the owner to accept."""
_MIN_COMPANY = 3


@dataclass(frozen=True)
class Bounds:
    """What an update may be beside others.

    Attributes:
        max_norm_ratio: Largest L2 norm, in medians of the round's; 0 = any.
        max_examples: Most examples that a site counts for; 0 = ``ACCEPTED_RATIO`` times the median
            of what the sites have.
        is_equal: Whether every site counts the same, whatever it says.
    """

    max_norm_ratio: float = 10.0
    max_examples: int = 0
    is_equal: bool = False

    def accepted(self, examples: Mapping[str, int | None]) -> dict[str, int | None]:
        """Return how many examples each site counts for; None where no site said how many it has.

        One that did not say counts as the median of those that did.

        Args:
            examples: Site to how many it joined with; None where it did not say.
        """
        said = [number for number in examples.values() if number is not None]
        if not said and not self.max_examples:
            return dict(examples)
        middle = median_low(said) if said else self.max_examples
        limit = max(self.max_examples or int(ACCEPTED_RATIO * middle), 1)
        return {
            site: min(middle if number is None else number, limit)
            for site, number in examples.items()
        }

    def too_long(
        self, norms: Sequence[float], earlier: Sequence[float] = ()
    ) -> tuple[list[int], float]:
        """Return which of a round's updates are too long, and the bound; 0 = there is none.

        Args:
            norms: L2 norm of each update; those of 0 have nothing in them.
            earlier: The medians of earlier rounds.
        """
        middle = round_median(norms) or max(earlier, default=0.0)
        bound = self.max_norm_ratio * middle
        return [i for i, norm in enumerate(norms) if 0 < bound < norm], bound


def round_median(norms: Sequence[float]) -> float:
    """Return the lower median of the updates that have anything in them; 0 where they are few."""
    own = [norm for norm in norms if norm > 0]
    return median_low(own) if len(own) >= _MIN_COMPANY else 0.0


def too_heavy(weights: Sequence[float], *, unbounded: Sequence[bool]) -> tuple[list[int], float]:
    """Return which updates of clients that never said how much they have weigh too much.

    Args:
        weights: The largest weight of each update.
        unbounded: Whether its client has no bound of its own.

    Returns:
        Their indices and the bound; 0 = there is none.
    """
    own = [weight for weight in weights if weight > 0]
    bound = ACCEPTED_RATIO * median_low(own) if len(own) >= _MIN_COMPANY else 0.0
    heavy = [i for i, weight in enumerate(weights) if unbounded[i] and 0 < bound < weight]
    return heavy, bound


def shares(pulls: Sequence[float], *, accepted: float = 0.0) -> list[float]:
    """Return for how much of its weight each update counts, in (0, 1]; 1 where they are few.

    Args:
        pulls: Weight times norm of each update: what it adds to a sum.
        accepted: A pull that counts whole however large it is beside the others.
    """
    middle = round_median(pulls)
    bound = max(ACCEPTED_RATIO * middle, accepted) if middle else 0.0
    return [bound / pull if 0 < bound < pull else 1.0 for pull in pulls]


def bounded(weights: Mapping[str, float], *, most: Mapping[str, float]) -> dict[str, float]:
    """Return weights of at most what their names may have."""
    return {name: min(weight, most.get(name, weight)) for name, weight in weights.items()}
