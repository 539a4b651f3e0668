"""That the server sees a sum alone: what a schedule says of it. The sum takes an extra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchard.communication.messages import Update
from orchard.trees import Tree

if TYPE_CHECKING:
    from orchard.engine.secret_sum import SecretRound


@dataclass(frozen=True)
class Secrecy:
    """How the sums of a run are kept secret.

    Attributes:
        least: Fewest members of a sum.
        bound: The largest absolute value in an update.
        max_weight: The largest weight of a name.
    """

    least: int
    bound: float
    max_weight: float

    def begin(self, cohort: Sequence[str], shared: Tree) -> SecretRound:
        """Return a sum between the members of a cohort, of updates to the global tree.

        Raises:
            ValueError: The cohort is too small.
        """
        from orchard.engine.secret_sum import SecretRound
        from orchard.secure.fixed_point import FixedPoint

        shapes = {name: tuple(tensor.shape) for name, tensor in shared.items()}
        written = FixedPoint(shapes, self.bound, self.max_weight, len(cohort))
        return SecretRound(written, cohort, least=self.least)


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
