"""What sites answer, looked at before it counts: kept on disk, or refused and said so."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from orchard.communication import door
from orchard.communication.audit import AuditLog, content_digest
from orchard.communication.channel import Channel
from orchard.communication.messages import Update
from orchard.communication.readable import readable
from orchard.communication.refusals import explain
from orchard.engine.evaluations import Ranges, measured_ranges
from orchard.engine.exchange import Answer
from orchard.engine.inbox import Arrived, Inbox
from orchard.engine.journal import Journal
from orchard.server.admission import Admission, check_measured
from orchard.strategies.expert_names import expert_of, is_router
from orchard.trees import Tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What one site was asked in a round.

    Attributes:
        round_number: The task's.
        trains: Whether to train.
        models: Which models to evaluate.
        local: Whether to evaluate right after training.
    """

    round_number: int
    trains: bool = True
    models: Collection[str] = ()
    local: bool = False


@dataclass(frozen=True)
class Taken:
    """What of a site's answer counts.

    Attributes:
        reply: What it says; None where it was refused.
        arrived: Its update, kept on disk; None where there is none.
        lacks_values: Whether it has to be sent the values whole.
    """

    reply: door.RoundDone | None = None
    arrived: Arrived | None = None
    lacks_values: bool = False


@dataclass(frozen=True)
class Intake:
    """Where answers of sites come in.

    Attributes:
        channel: Decodes updates, and counts their bytes.
        admission: Which updates are let in.
        base_digest: Of the base model, which every site must hold too.
        inbox: Keeps what was let in until it is aggregated.
        audit: Is told of both.
        ranges: What sites may measure.
        examples: Site to how many examples it joined with; None where it did not say.
        accepted: Site to how many examples it counts for; None where no site said how many it has.
        has_preferences: Whether routers count by preference, not by examples.
        journal: Is told whose message is read.
        is_secret: Whether updates stay at the sites, and what they send here holds no tensor.
    """

    channel: Channel
    admission: Admission
    base_digest: str
    inbox: Inbox
    audit: AuditLog
    ranges: Ranges = field(default_factory=measured_ranges)
    examples: dict[str, int | None] = field(default_factory=dict)
    accepted: dict[str, int | None] = field(default_factory=dict)
    has_preferences: bool = False
    journal: Journal | None = None
    is_secret: bool = False

    def take(self, answer: Answer, asked: Asked, shared: Tree, *, is_last: bool = True) -> Taken:
        """Check what a site answers, and keep its update on disk.

        An answer of which any part is refused counts for nothing.

        Args:
            answer: Of one site.
            asked: What it answers.
            shared: The global tree, whose names and shapes an update must have.
            is_last: Whether a site that lacks values cannot be sent them now.
        """
        with self.reading(answer.site, asked.round_number, message=answer.body):
            return self._take(answer, asked, shared, is_last=is_last)

    def reading(
        self, site: str, round_number: int, *, path: Path | None = None, message: bytes = b""
    ) -> AbstractContextManager[None]:
        """See ``Journal.reading``; nothing where there is no journal."""
        if self.journal is None:
            return nullcontext()
        return self.journal.reading(site, round_number, path=path, message=message)

    def _take(self, answer: Answer, asked: Asked, shared: Tree, *, is_last: bool) -> Taken:
        try:
            reply = self._read(answer, is_last=is_last)
            if isinstance(reply, door.LacksValues):
                return Taken(lacks_values=True)
            if reply.changed:
                self._note_changes(answer.site, asked.round_number, reply.changed)
            check_measured(reply.evaluation, models=asked.models, metrics=self.ranges)
            if not asked.trains:
                return Taken(reply)
            update, norm = self.look(answer.body, answer.site, asked, shared)
        except Exception as error:  # whatever a message does to us is the message's fault
            self.refuse(answer.site, asked.round_number, describe(error))
            return Taken()
        self.channel.uplink_bytes += len(answer.body)
        arrived = self.inbox.put(answer.site, asked.round_number, answer.body)
        self.audit.write(
            "received",
            site=answer.site,
            round=asked.round_number,
            num_names=len(update.delta),
            bytes=len(answer.body),
            sha256=content_digest(answer.body),
        )
        return Taken(reply, self._weighed(arrived, update, norm, shared))

    def _weighed(self, own: Arrived, update: Update, norm: float, shared: Tree) -> Arrived:
        """Return an update with its norm, its largest weights and its size."""
        routers = {name for name in update.weight if self.has_preferences and is_router(name)}
        return own.weighed(
            norm,
            max((w for name, w in update.weight.items() if name not in routers), default=0.0),
            max((update.weight[name] for name in routers), default=0.0),
            num_values=sum(shared[name].numel() for name in update.delta),
        )

    def _note_changes(self, site: str, round_number: int, what: Collection[str]) -> None:
        """Write down that a site says of itself that something is not as it was."""
        self.audit.write("changed", site=site, round=round_number, what=list(what))
        log.warning("round %d, %s: changed since: %s", round_number, site, ", ".join(what))

    def _read(self, answer: Answer, *, is_last: bool) -> door.RoundDone | door.LacksValues:
        if answer.failure:
            raise ValueError(answer.failure)
        reply = door.read_round_reply(answer.header)
        if reply.site not in (None, answer.site):
            raise ValueError(f"site must be {answer.site}, who was asked, got {reply.site}")
        if isinstance(reply, door.Refused):
            raise ValueError(explain(reply.refused, reply.option))
        if isinstance(reply, door.LacksValues):
            if is_last:
                raise ValueError("site must read whole values, got an answer that it lacks some")
            return reply
        if reply.base_digest != self.base_digest:
            raise ValueError(
                f"base model must be {self.base_digest[:12]}, got {reply.base_digest[:12]}"
            )
        return reply

    def look(self, message: bytes, site: str, asked: Asked, shared: Tree) -> tuple[Update, float]:
        """Return the update that a message holds, and its L2 norm.

        Raises:
            ValueError: It must not be aggregated.
        """
        if self.is_secret:  # not even decoded
            self.admission.check_no_tensors(message)
        self.admission.check_header(message, shared)
        update = self.channel.unpack_update(message, shared)
        norm = self.admission.check(
            update,
            client_id=site,
            round_number=asked.round_number,
            shared=shared,
            local=self.ranges if asked.local else {},
            most=self.most(site, shared),
        )
        joined, now = self.examples.get(site), update.metrics.get("client/num_examples")
        if joined is not None and now not in (None, joined):
            raise ValueError(
                f"site must have the {joined} training examples that it joined with, got {now:g}; "
                "bring back its data, or start another run"
            )
        return update, norm

    def look_again(self, message: bytes, own: Arrived, asked: Asked, shared: Tree) -> Arrived:
        """Return an update that lay on disk with what is found in it.

        Raises:
            ValueError: It must not be aggregated.
        """
        with self.reading(own.client_id, own.round_number, path=own.path):
            update, norm = self.look(message, own.client_id, asked, shared)
        return self._weighed(own, update, norm, shared)

    def most(self, site: str, shared: Tree, *, is_said: bool = True) -> dict[str, float] | None:
        """Return name to the largest weight that a site can have for it; None = it never said.

        A name counts as many times as the site has examples, or once. Where routers count by
        preference, each counts at most as many times as there are experts.

        Args:
            site: Whose.
            shared: The global tree.
            is_said: Whether by the examples that it joined with, or by those that it counts for.
        """
        number = self.examples.get(site) if is_said else None
        number = self.accepted.get(site) if number is None else number
        if number is None:
            return None
        limit = router = float(max(number, 1))
        if self.has_preferences:
            # What nobody prefers weighs far less than one, so that examples bound nothing here.
            router = float(max(len({expert_of(name) for name in shared} - {None}), 1))
        return {name: router if is_router(name) else limit for name in shared}

    def set_apart(self, own: Arrived, reason: str) -> None:
        """Move an update to the quarantine, and say why."""
        self.refuse(own.client_id, own.round_number, f"{reason}; set apart in quarantine/")
        self.inbox.set_apart(own, reason)

    def set_apart_blamed(self) -> None:
        """Set apart what the process ended in too often, before it is met again."""
        for own in self.journal.blamed() if self.journal else ():
            arrived = Arrived(own.site, own.round_number, own.path, 0)
            self.set_apart(arrived, own.reason)

    def refuse(self, site: str, round_number: int, reason: str) -> None:
        """Write down that something of a site was refused, and why."""
        reason = readable(reason)
        self.audit.write("refused", site=site, round=round_number, reason=reason)
        log.warning("round %d, %s: %s", round_number, site, reason)


def describe(error: Exception) -> str:
    """Return what an error says, with its type where it is none that a check raises."""
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return readable(f"{name}{error}")
