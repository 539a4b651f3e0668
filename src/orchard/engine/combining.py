"""From a round's updates to the next state, whatever is in them.

What passes every check can still bring the aggregation down, alone or with others. Then the update
that caused it is found by leaving one out at a time, and set apart; the others make the round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from orchard.communication.messages import Update
from orchard.engine.coverage import Coverage
from orchard.engine.inbox import Arrived, likeliest
from orchard.engine.intake import describe
from orchard.server.checkpoint import ServerState
from orchard.server.robust import TooFewContributorsError
from orchard.strategies.strategy import Strategy, update_server

log = logging.getLogger(__name__)
Read: TypeAlias = Callable[[Arrived], Update]
Check: TypeAlias = Callable[[ServerState, Sequence[Arrived]], None]


@dataclass(frozen=True)
class Combined:
    """What a round's updates made.

    Attributes:
        state: After the round.
        lines: What clients measured, a line each.
        covered: What the round covers of the experts.
        counted: The updates in it.
        culprits: Those that are not, and why.
    """

    state: ServerState
    lines: Sequence[Mapping[str, Any]]
    covered: Mapping[str, Any]
    counted: Sequence[Arrived]
    culprits: Sequence[tuple[Arrived, str]] = ()


@dataclass(frozen=True)
class Combiner:
    """Makes a round.

    Attributes:
        strategy: The method.
        state: Before the round.
        read: Reads an update from disk.
        check: Raises where a state must not be committed.
        coverage: Begins to count what a round covers.
        working: Is told how many updates were read.
        noting: Of the journal: is told which update is read and added to so many others from now
            on; None where all are together.
    """

    strategy: Strategy
    state: ServerState
    read: Read
    check: Check
    coverage: Callable[[], Coverage]
    working: Callable[[int], None] = lambda number: None
    noting: Callable[[Arrived | None, int], None] = lambda own, num_others: None

    def combine(self, arrived: Sequence[Arrived]) -> Combined | None:
        """Return what updates make, without those that bring it down; None where all do.

        Raises:
            Exception: The aggregation fails, and no update is to blame: it fails whichever is left
                out, and with each alone.
            OSError: A disk is full or gone, which is no update's fault.
        """
        culprits: list[tuple[Arrived, str]] = []
        counted = list(arrived)
        while counted:
            try:
                return replace(self._once(counted), culprits=culprits)
            except OSError:
                raise
            except Exception as error:
                found = self._culprits(counted, error)
                if not found:
                    raise
                culprits += [(own, describe(reason)) for own, reason in found]
                counted = [own for own in counted if own not in [guilty for guilty, _ in found]]
        return Combined(self.state, (), {}, (), culprits) if culprits else None

    def _once(self, arrived: Sequence[Arrived]) -> Combined:
        lines: list[Mapping[str, Any]] = []
        coverage = self.coverage()
        try:
            state = update_server(self.strategy, self.state, self._read(arrived, lines, coverage))
        except TooFewContributorsError as error:
            log.warning("round %d changes nothing: %s", self.state.round_number + 1, error)
            state = replace(self.state, round_number=self.state.round_number + 1)
        self.check(state, arrived)
        return Combined(state, lines, coverage.summary(), list(arrived))

    def _read(
        self, arrived: Iterable[Arrived], lines: list[Mapping[str, Any]], coverage: Coverage
    ) -> Iterator[Update]:
        """Yield updates from disk, one at a time, and note their metrics."""
        number = self.state.round_number + 1
        for position, own in enumerate(arrived):
            self.noting(own, position)
            update = self.read(own)
            line = {"kind": "client", "round": number, "client": update.client_id}
            lines.append({**update.metrics, **line})
            coverage.add(update)
            self.working(position)
            yield update
        self.noting(None, len(lines))

    def try_alone(self, own: Arrived) -> None:
        """Add an update to none: whether the process lives is seen; what is raised is not."""
        with suppress(Exception):
            update_server(self.strategy, self.state, self._read([own], [], self.coverage()))

    def _culprits(
        self, arrived: Sequence[Arrived], error: Exception
    ) -> list[tuple[Arrived, Exception]]:
        """Return whose updates the failure goes away without, the likeliest first."""
        if len(arrived) == 1:
            return [(arrived[0], error)] if self._works_empty() else []
        for suspect in likeliest(arrived):
            if self._fails([own for own in arrived if own is not suspect]) is None:
                return [(suspect, error)]
        alone = [(own, self._fails([own])) for own in arrived]
        found = [(own, reason) for own, reason in alone if reason is not None]
        return found if len(found) < len(arrived) else []

    def _works_empty(self) -> bool:
        """Say whether the method stands a round in which an update without names came."""
        empty = Update("", self.state.round_number + 1, {}, {})
        try:
            state = update_server(self.strategy, self.state, [empty])
            self.check(state, ())
        except Exception:
            return False
        return True

    def _fails(self, arrived: Sequence[Arrived]) -> Exception | None:
        try:
            self._once(arrived)
        except OSError:
            raise
        except Exception as error:
            return error
        return None
