"""That the server sees a sum alone: what a schedule says of it. The sum takes an extra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchard.communication.messages import Update
from orchard.trees import Tree

if TYPE_CHECKING:
    from orchard.engine.secret_sum import SecretRound
    from orchard.secure.fixed_point import FixedPoint


@dataclass(frozen=True)
class Secrecy:
    """How the sums of a run are kept secret.

    Attributes:
        least: Fewest members of a sum.
        bound: The largest absolute value in an update.
        max_weight: The largest weight of a name; 0 = see ``among``.
        num_neighbors: With how many others each member masks; 0 = with all.
    """

    least: int
    bound: float
    max_weight: float
    num_neighbors: int = 0

    def among(self, examples: Iterable[int | None]) -> Secrecy:
        """Return it with the largest weight, where that follows from how many examples sites have.

        Args:
            examples: For how many each site counts; None where it did not say.
        """
        return self if self.max_weight else replace(self, max_weight=_most(examples))

    def written(self, cohort_size: int, shared: Tree) -> FixedPoint:
        """Return how members of a cohort write their updates to the global tree."""
        from orchard.secure.fixed_point import FixedPoint

        shapes = {name: tuple(tensor.shape) for name, tensor in shared.items()}
        return FixedPoint(shapes, self.bound, self.max_weight, cohort_size)

    def begin(self, cohort: Sequence[str], shared: Tree) -> SecretRound:
        """Return a sum between the members of a cohort, of updates to the global tree.

        Raises:
            ValueError: The cohort is too small.
        """
        from orchard.engine.secret_sum import SecretRound

        written = self.written(len(cohort), shared)
        return SecretRound(written, cohort, least=self.least, num_neighbors=self.num_neighbors)


def _most(examples: Iterable[int | None]) -> float:
    return float(max((number for number in examples if number is not None), default=1) or 1)


def sum_in_secret(
    updates: Iterable[Update], secret: SecretRound, round_number: int
) -> Iterator[Update]:
    """Yield one update, the mean of all: what the server sees of them.

    Args:
        updates: Of the members, at their side.
        secret: The round's sum.
        round_number: Of the round.
    """
    for update in updates:
        secret.send(update)
        del update
    yield secret.end(round_number)
