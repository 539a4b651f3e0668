"""Which updates of a round count, for how much, and what they make."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from orchard.communication.channel import Channel
from orchard.communication.messages import Update
from orchard.engine.combining import Combined, Combiner
from orchard.engine.coverage import Coverage
from orchard.engine.inbox import Arrived, likeliest
from orchard.engine.intake import Intake
from orchard.engine.journal import Journal
from orchard.engine.progress import Reporter
from orchard.engine.simulator import rounds_since_sent
from orchard.process_memory import peak_memory_bytes
from orchard.results import MetricsLog
from orchard.server.admission import SMALLEST_WEIGHT
from orchard.server.beside import Bounds, bounded, round_median, shares, too_heavy
from orchard.server.checkpoint import ServerState
from orchard.server.moves import check_move
from orchard.strategies.strategy import Strategy, update_server
from orchard.trees import select, squared_norm

logger = logging.getLogger(__name__)


@dataclass
class Rounds:
    """Makes rounds of what the intake let in.

    Attributes:
        intake: Where updates came in.
        log: Of the run's metrics.
        reporter: Shows progress.
        bounds: What an update may be beside the others of its round.
        max_move: Largest L2 norm by which a round moves the global tree; 0 = see ``check_move``.
        staleness: What a late update counts, to the power of the rounds that it is late.
    """

    intake: Intake
    log: MetricsLog
    reporter: Reporter
    bounds: Bounds
    max_move: float
    staleness: float

    def join(self, examples: Mapping[str, int | None]) -> None:
        """Note how many examples each site joined with, and say where it counts for fewer."""
        self.intake.examples.update(examples)
        accepted = self.bounds.accepted(examples)
        self.intake.accepted.update(accepted)
        for site, number in examples.items():
            if number is not None and number != accepted[site]:
                logger.warning(
                    "%s counts for %s examples, not for the %s that it joined with; see "
                    "deployment.max_examples",
                    site,
                    accepted[site],
                    number,
                )

    def settle(
        self, arrived: Sequence[Arrived], sites: Sequence[str]
    ) -> tuple[list[Arrived], set[str]]:
        """Return the updates that count, in the order of sites, and whose are out of bounds.

        A site counts once, by its newest update.
        """
        newest = {own.client_id: own for own in sorted(arrived, key=lambda own: own.round_number)}
        for own in arrived:
            if own is not newest[own.client_id]:
                self._drop(
                    own,
                    f"came late, beside the update of round "
                    f"{newest[own.client_id].round_number}; a site counts once",
                )
        kept = [newest[site] for site in sites if site in newest]
        long, bound = self.bounds.too_long([own.norm for own in kept], self._medians())
        for own in (kept[i] for i in long):
            self._drop(
                own,
                f"norm of the update must be at most {bound:g}, "
                f"{self.bounds.max_norm_ratio:g} times the median of its round, got "
                f"{own.norm:g}; see deployment.max_norm_ratio",
            )
        never_said = [self.intake.accepted.get(own.client_id) is None for own in kept]
        heavy, most = too_heavy([own.weight for own in kept], unbounded=never_said)
        for own in (kept[i] for i in heavy if i not in long):
            self._drop(
                own,
                f"weight must be at most {most:g} where a site has not said how many "
                f"examples it has, got {own.weight:g}",
            )
        odd = {kept[i].client_id for i in (*long, *heavy)}
        return [own for own in self._shared_out(kept) if own.client_id not in odd], odd

    def _shared_out(self, kept: Sequence[Arrived]) -> list[Arrived]:
        """Return updates with their share: none pulls at the tree far more than the median does."""
        pulls = [own.norm * self._counts(own) for own in kept]
        whole = 0 if self.bounds.is_equal else self.bounds.max_examples
        # A preference is the sender's own word: none counts for far more than the median's.
        by_preference = shares([own.preference for own in kept])
        accepted = whole * round_median([own.norm for own in kept])
        found = []
        by_pull = shares(pulls, accepted=accepted)
        for own, *both in zip(kept, by_pull, by_preference, strict=True):
            share = min(both)
            if share < 1:
                logger.warning(
                    "round %d, %s: counts for %.3g of its weight: weight times norm is held to a "
                    "few times the median of its round; see deployment.max_examples",
                    own.round_number,
                    own.client_id,
                    share,
                )
            found.append(replace(own, share=share))
        return found

    def _counts(self, own: Arrived) -> float:
        """Return for how many examples an update counts."""
        if self.bounds.is_equal:
            return 1.0
        accepted = self.intake.accepted.get(own.client_id)
        return own.weight if accepted is None else min(own.weight, float(max(accepted, 1)))

    def _medians(self) -> list[float]:
        """Return the median norms of the updates of earlier rounds."""
        return [
            line["round/median_update_norm"]
            for line in self.log
            if line["kind"] == "round" and "round/median_update_norm" in line
        ]

    def _drop(self, own: Arrived, reason: str) -> None:
        self.intake.refuse(own.client_id, own.round_number, reason)
        self.intake.inbox.throw_away([own])

    def combine(
        self, strategy: Strategy, state: ServerState, arrived: Sequence[Arrived]
    ) -> Combined | None:
        """Return what the updates of a round make, and set apart those that bring it down.

        Raises:
            RuntimeError: The process ended before, whichever update was left out.
        """
        number, journal = state.round_number + 1, self.intake.journal
        suspect = ""
        if journal:
            self._try_alone(strategy, state, arrived, journal)
            suspect = journal.suspect(number, [own.client_id for own in likeliest(arrived)])
        kept = [own for own in arrived if own.client_id != suspect]
        with journal.combining(number, left_out=suspect) if journal else nullcontext():
            made = self._combiner(strategy, state, kept).combine(kept)
        for own in (own for own in arrived if own.client_id == suspect):
            reason = "the process ended again and again in this round, and did not without this"
            made = made or Combined(state, (), {}, ())
            made = replace(made, culprits=(*made.culprits, (own, reason)))
        for own, reason in made.culprits if made else ():
            self.intake.set_apart(own, reason)
        return made

    def combine_sum(
        self,
        strategy: Strategy,
        state: ServerState,
        members: Sequence[Arrived],
        total: Update | None,
    ) -> Combined:
        """Return what a secure sum makes; it changes nothing where it was spoiled.

        Args:
            strategy: The method.
            state: Before the round.
            members: What those in the sum have measured, in the order of sites.
            total: The mean of their updates, as one; None = spoiled.

        Raises:
            PoisonedError: The tree moved too far.
        """
        number = state.round_number + 1
        lines: list[Mapping[str, Any]] = []
        for own in members:
            metrics = self.intake.channel.unpack_update(own.path.read_bytes(), {}).metrics
            lines.append({**metrics, "kind": "client", "round": number, "client": own.client_id})
        coverage = Coverage(state.shared, rounds_since_sent(self.log))
        if total is None:
            after = replace(state, round_number=number)
        else:
            coverage.add(total)
            after = update_server(strategy, state, [total])
            longest = math.sqrt(squared_norm(total.delta))
            check_move(state, after, longest=longest, max_move=self.max_move)
        return Combined(after, lines, coverage.summary(), list(members))

    def _try_alone(
        self, strategy: Strategy, state: ServerState, arrived: Sequence[Arrived], journal: Journal
    ) -> None:
        """Add each update alone that the process ended in beside others, to see whose fault it was.

        Whoever comes last beside one that takes all memory would be blamed for it.
        """
        number = state.round_number + 1
        for own in arrived:
            if journal.doubts(own.client_id, number):
                logger.warning("round %d, %s: its update is tried alone", number, own.client_id)
                combiner = self._combiner(strategy, state, [own])
                with journal.reading(own.client_id, number, path=own.path):
                    replace(combiner, noting=lambda own, num_others: None).try_alone(own)
                journal.clear(own.client_id, number)

    def _note(self, own: Arrived | None, num_others: int) -> None:
        if self.intake.journal is None:
            return
        if own is None:
            self.intake.journal.together()
        else:
            self.intake.journal.adding(own.client_id, own.path, is_beside=num_others > 0)

    def _combiner(
        self, strategy: Strategy, state: ServerState, arrived: Sequence[Arrived]
    ) -> Combiner:

        def working(position: int) -> None:
            self.reporter.working("updates are aggregated", share=position / len(arrived))

        def check(after: ServerState, own: Sequence[Arrived]) -> None:
            norms = [one.norm for one in own]
            # Without a median to hold updates to, the longest is whatever its sender likes.
            is_held = bool(round_median(norms) or self._medians())
            longest = max(norms, default=0.0) if is_held else 0.0
            check_move(state, after, longest=longest, max_move=self.max_move)

        return Combiner(
            strategy,
            state,
            read=lambda own: self._read(own, state),
            check=check,
            coverage=lambda: Coverage(state.shared, rounds_since_sent(self.log)),
            working=working,
            noting=self._note,
        )

    def _read(self, own: Arrived, state: ServerState) -> Update:
        """Return an update from disk, as much as it counts; a name without weight is left alone."""
        update = self.intake.channel.unpack_update(own.path.read_bytes(), state.shared)
        most = self.intake.most(own.client_id, state.shared, is_said=False)
        discount = own.share * self.staleness ** (state.round_number + 1 - own.round_number)
        weight = bounded(update.weight, most=most or {})
        weight = {
            name: discount * (1.0 if self.bounds.is_equal else value)
            for name, value in weight.items()
            if value > 0
        }
        # Also one so late that its weight is 0 in float32.
        weight = {name: value for name, value in weight.items() if value >= SMALLEST_WEIGHT}
        delta = update.delta
        if len(weight) < len(delta):
            delta = select(delta, weight)
        return replace(update, delta=delta, weight=weight)


def summarize(
    lines: Sequence[Mapping[str, Any]],
    arrived: Sequence[Arrived],
    channel: Channel,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Return one round's numbers; sites work at the same time, so the slowest one counts."""
    losses = [line["client/train_loss"] for line in lines if "client/train_loss" in line]
    longest = {
        what: max((line.get(f"client/{what}_seconds", 0.0) for line in lines), default=0.0)
        for what in ("prepare", "train")
    }
    busy = [
        math.fsum(
            line.get(f"client/{what}_seconds", 0.0) for what in ("prepare", "train", "evaluation")
        )
        for line in lines
    ]
    middle = round_median([own.norm for own in arrived])
    return {
        **({"round/train_loss": math.fsum(losses) / len(losses)} if losses else {}),
        "round/num_clients": len(lines),
        # Not who sends no loss: a site of few rows trains and does not tell it.
        "round/num_dropped_out": sum(line.get("client/dropped_out", 0.0) > 0 for line in lines),
        "round/seconds": seconds,
        "round/prepare_seconds": longest["prepare"],
        "round/train_seconds": longest["train"],
        "round/evaluation_seconds": 0.0,
        "round/overhead_seconds": seconds - max(busy, default=0.0),
        "round/uplink_bytes": channel.uplink_bytes,
        "round/downlink_bytes": channel.downlink_bytes,
        "round/peak_memory_bytes": peak_memory_bytes(),
        **({"round/median_update_norm": middle} if middle else {}),
    }
