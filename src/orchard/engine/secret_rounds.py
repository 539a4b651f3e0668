"""A round between sites whose coordinator sees the sum of the updates and none of them.

Sites train first, keep their updates, and send what they measured. Then those who have one are
asked the five questions of a secure sum, each of all who answered the one before. Who answers what
cannot be is named, and is in no further sum of the round; who does not answer has left, and is made
up for while enough are there. With too few the sum is given up and begun anew, with a new nonce and
therefore with new keys and masks of everybody: nothing of it is kept here, so that a coordinator
that was killed in the middle begins anew too.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from orchard.communication import door
from orchard.communication.channel import Broadcast
from orchard.communication.messages import Update
from orchard.communication.refusals import Code, explain
from orchard.communication.sum_messages import (
    EndTold,
    KeysTold,
    SharesTold,
    SurvivorsTold,
    VectorTold,
)
from orchard.engine import secret_words as words
from orchard.engine.combining import Combined
from orchard.engine.exchange import Answer, Patience, Post, Request, exchange
from orchard.engine.inbox import Arrived
from orchard.engine.intake import Intake, describe
from orchard.engine.rounds import Rounds
from orchard.engine.secrecy import Secrecy
from orchard.engine.secret_sum import SUM
from orchard.results import write_json
from orchard.secure.collector import Collector, TooFewError
from orchard.secure.fixed_point import FixedPoint
from orchard.secure.rules import (
    Advertisement,
    MisbehavedError,
    Rules,
    Shared,
    default_threshold,
)
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import Strategy
from orchard.trees import Tree, digest

BARRED_FILE = "barred.json"
log = logging.getLogger(__name__)
_Told = TypeVar("_Told", KeysTold, SharesTold, VectorTold, SurvivorsTold, EndTold)
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Summed:
    """What came of one try.

    Attributes:
        total: The mean of all updates, as one; None = there is no sum.
        members: Whose updates are in it.
        is_spoiled: Whether shares were told, so that the round has no other sum, and this one is
            none: the round changes nothing.
        barred: Who spoiled it, where that is known.
        excluded: Who is in no further sum of the round.
        untrained: Who has no update any more, and must be asked to train again.
    """

    total: Update | None
    members: tuple[str, ...] = ()
    is_spoiled: bool = False
    barred: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    untrained: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SumTask:
    """What is added.

    Attributes:
        run: Names the run.
        recipe_digest: Of its recipe.
        round_number: Whose updates.
        shared: The global tree before the round.
        tree_digest: Of the values that sites trained from.
        cohort_size: How many were asked to train.
    """

    run: str
    recipe_digest: str
    round_number: int
    shared: Tree
    tree_digest: str
    cohort_size: int


@dataclass
class SecretTry:
    """One try of one sum.

    Attributes:
        post: Carries requests.
        intake: Writes down who was refused, and counts bytes.
        patience: How long is waited for each answer.
        secrecy: How sums are kept secret.
        task: What is added.
        sites: Who says that it has an update.
    """

    post: Post
    intake: Intake
    patience: Patience
    secrecy: Secrecy
    task: SumTask
    sites: Sequence[str]
    _nonce: str = ""
    _excluded: set[str] = field(default_factory=set)
    _untrained: set[str] = field(default_factory=set)

    def run(self) -> Summed:
        """Ask the five questions, and return what came of it."""
        found = Summed(None)
        try:
            found = self._run()
        except TooFewError as error:
            log.warning("round %d: no sum: %s", self.task.round_number, error)
            self._note("gave up", reason=str(error))
        return replace(
            found, excluded=frozenset(self._excluded), untrained=frozenset(self._untrained)
        )

    def _run(self) -> Summed:
        own = self.task
        threshold = default_threshold(len(self.sites))
        rules = Rules(self.secrecy.least, threshold, self.secrecy.num_neighbors)
        if len(self.sites) < rules.fewest:
            raise TooFewError(f"members must be at least {rules.fewest}, got {len(self.sites)}")
        written = self.secrecy.written(own.cohort_size, own.shared)
        self._nonce = secrets.token_hex(32)
        terms = words.Terms(
            run=own.run,
            recipe_digest=own.recipe_digest,
            round_number=own.round_number,
            tree_digest=own.tree_digest,
            nonce=self._nonce,
            threshold=threshold,
            written=written,
            num_neighbors=self.secrecy.num_neighbors,
        )
        self._note("begun", members=list(self.sites), threshold=threshold)
        collector = Collector(rules, terms.session(), written.length)
        self._exchange_keys(collector, terms)
        self._add_vectors(collector, written)
        self._tell_survivors(collector, fewest=rules.fewest)
        members = tuple(collector.survivors())
        try:
            mean = written.decode(collector.unmask())
        except MisbehavedError as error:
            # Who told its shares is in no other sum of this round, so nobody can do it again.
            log.error("round %d changes nothing: %s", own.round_number, error)
            self._exclude(error.name, error)
            self._note("spoiled", site=error.name)
            return Summed(None, members, is_spoiled=True, barred=frozenset((error.name,)))
        self._note("summed", members=list(members))
        largest = max((float(tensor.abs().max()) for tensor in mean.values()), default=0.0)
        if not largest <= written.largest_mean:
            # Nobody can say whose it is, and the next try would be no other.
            log.error(
                "round %d changes nothing: values of a mean must be within %g, got %g; one of "
                "%s sent what it was not to",
                own.round_number,
                written.largest_mean,
                largest,
                ", ".join(members),
            )
            self._note("spoiled", largest=largest)
            return Summed(None, members, is_spoiled=True)
        return Summed(Update(SUM, own.round_number, mean, dict.fromkeys(mean, 1.0)), members)

    def _exchange_keys(self, collector: Collector, terms: words.Terms) -> None:
        def read_keys(answer: Answer, told: KeysTold) -> Advertisement:
            own = words.read_keys(answer.site, told)
            collector.check_advertisement(answer.site, own)
            return own

        asked = terms.asked()
        advertised = self._ask("sum_keys", self.sites, lambda site: asked, KeysTold, read_keys)
        collector.take_advertisements(advertised)
        members = {name: words.keys_as_json(own) for name, own in advertised.items()}

        def read_shares(answer: Answer, told: SharesTold) -> Shared:
            own = words.read_shares(told)
            collector.check_shared(answer.site, own)
            return own

        fields = {"members": members}
        shared = self._ask("sum_shares", advertised, lambda site: fields, SharesTold, read_shares)
        collector.take_shares(shared)

    def _add_vectors(self, collector: Collector, written: FixedPoint) -> None:
        sharing = collector.sharing

        def fields(site: str) -> Mapping[str, Any]:
            return {
                "sharing": sharing,
                "handed": words.handed_as_json(collector.shares_for(site)),
            }

        def add(answer: Answer, told: VectorTold) -> None:
            # One at a time into the sum; what stays of it is a signature.
            collector.add(words.read_vector(told, answer.body, length=written.length))

        self._ask("sum_vector", sharing, fields, VectorTold, add)
        for name in collector.lost():
            self._exclude(
                name,
                ValueError("shares of secrets must be readable to most neighbors, got others"),
            )
        if self._excluded & {*collector.lost()}:
            raise TooFewError("secrets of all members must come back, got some that cannot")

    def _tell_survivors(self, collector: Collector, *, fewest: int) -> None:
        survivors = collector.survivors()

        def read_signature(answer: Answer, told: SurvivorsTold) -> str:
            return told.signature

        fields = {"survivors": words.hexed(survivors)}
        confirmed = self._ask(
            "sum_survivors", survivors, lambda site: fields, SurvivorsTold, read_signature
        )
        if len(confirmed) < fewest:
            raise TooFewError(
                f"survivors who agree on who they are must be at least {fewest}, got "
                f"{len(confirmed)}; the round is done again"
            )
        ending = {"confirmed": confirmed}

        def take(answer: Answer, told: EndTold) -> None:
            collector.take_revealed(words.read_revealed(told))

        self._ask("sum_end", confirmed, lambda site: ending, EndTold, take)

    def _ask(
        self,
        kind: str,
        sites: Iterable[str],
        fields: Callable[[str], Mapping[str, Any]],
        told: type[_Told],
        take: Callable[[Answer, _Told], _Found],
    ) -> dict[str, _Found]:
        """Ask a question, and return what each site's answer gives that is one, by name."""
        number, channel = self.task.round_number, self.intake.channel
        common = {"kind": kind, "run": self.task.run, "round": number, "nonce": self._nonce}
        requests = {site: Request({**common, "site": site, **fields(site)}) for site in sites}
        for request in requests.values():
            channel.downlink_bytes += len(json.dumps(request.header))
        found: dict[str, _Found] = {}
        ask = partial(exchange, seconds=self.patience.sum_seconds)
        for answer in ask(self.post, requests, self.patience):
            try:
                with self.intake.reading(answer.site, number, message=answer.body):
                    if (own := self._read(answer, told)) is not None:
                        found[answer.site] = take(answer, own)
                channel.uplink_bytes += len(json.dumps(dict(answer.header))) + len(answer.body)
            except Exception as error:  # whatever a message does to us is the message's fault
                self._exclude(answer.site, error)
        return {site: found[site] for site in sorted(found)}

    def _read(self, answer: Answer, told: type[_Told]) -> _Told | None:
        """Return what a site says; None where it does not, which is no fault.

        Raises:
            ValueError: It is no answer, or another site's.
        """
        if answer.failure:
            self._leave(answer.site, answer.failure)
            return None
        own = door.read_sum_reply(answer.header, told)
        if own.site not in (None, answer.site):
            raise ValueError(f"site must be {answer.site}, who was asked, got {own.site}")
        if isinstance(own, door.Refused):
            if own.refused == Code.NOT_TRAINED:
                self._untrained.add(answer.site)
            if own.refused == Code.BEYOND_BOUND:  # as it would be the next time
                self._excluded.add(answer.site)
            self._leave(answer.site, explain(own.refused, own.option))
            return None
        return own

    def _leave(self, site: str, reason: str) -> None:
        self.intake.refuse(site, self.task.round_number, f"left a secure sum: {reason}")

    def _exclude(self, site: str, error: Exception) -> None:
        self._excluded.add(site)
        reason = f"{describe(error)}; in no further sum of the round"
        self.intake.refuse(site, self.task.round_number, reason)

    def _note(self, what: str, **facts: Any) -> None:
        own = {"round": self.task.round_number, "nonce": self._nonce[:16], "sum": what}
        self.intake.audit.write("secure_sum", **own, **facts)


@dataclass
class SecretRounds:
    """Makes rounds of sums, for the coordinator.

    Attributes:
        secrecy: How sums are kept secret.
        run: Names the run.
        recipe_digest: Of its recipe.
        folder: Of the run: who spoiled a sum stands there, and is in no later one.
    """

    secrecy: Secrecy
    run: str
    recipe_digest: str
    folder: Path

    @property
    def barred(self) -> frozenset[str]:
        """Sites that are in no sum of this run any more."""
        path = self.folder / BARRED_FILE
        return frozenset(json.loads(path.read_text()) if path.exists() else ())

    def combine(
        self,
        post: Post,
        rounds: Rounds,
        strategy: Strategy,
        state: ServerState,
        broadcast: Broadcast,
        arrived: Sequence[Arrived],
        *,
        cohort_size: int,
        patience: Patience,
    ) -> tuple[Combined | None, Summed]:
        """Add the updates of those who trained, and return what they make; None = not this time.

        Args:
            post: Carries requests.
            rounds: Makes a state of a sum.
            strategy: The method.
            state: Before the round.
            broadcast: What sites trained from.
            arrived: What those who have an update have measured.
            cohort_size: How many were asked to train.
            patience: How long is waited for each answer.
        """
        intake = rounds.intake
        # As a site has read it, whatever became of it on the way.
        values = broadcast.channel.unpack_task(broadcast.whole).shared
        task = SumTask(
            self.run,
            self.recipe_digest,
            state.round_number + 1,
            state.shared,
            tree_digest=digest(values),
            cohort_size=cohort_size,
        )
        secrecy = self.secrecy.among(intake.accepted.values())
        sites = sorted(own.client_id for own in arrived)
        summed = SecretTry(post, intake, patience, secrecy, task, sites).run()
        if summed.barred:
            write_json(self.folder / BARRED_FILE, sorted(self.barred | summed.barred))
        if summed.total is None and not summed.is_spoiled:
            return None, summed
        members = [own for own in arrived if own.client_id in summed.members]
        return rounds.combine_sum(strategy, state, members, summed.total), summed
