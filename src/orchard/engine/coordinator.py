"""The same rounds as the simulator's, with clients that are sites elsewhere.

The coordinator asks sites to train and evaluate by messages, and calls ``update_server``; sites
call ``train_client`` and ``evaluate_client``. A round is committed by its checkpoint; what a crash
interrupts is run again from the last one, with the same sites and the same draws.

One message per round carries both: a site first evaluates the global tree that it is sent, which
is the result of the round before, and then trains from it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from orchard.communication.audit import AuditLog, content_digest
from orchard.communication.channel import Broadcast, Channel
from orchard.communication.door import RoundDone
from orchard.communication.messages import LocalSettings, Task
from orchard.engine.evaluations import Ranges, measured_ranges, models_due
from orchard.engine.exchange import Answer, Patience, Post, Request, exchange
from orchard.engine.inbox import Arrived, Inbox
from orchard.engine.intake import Asked, Intake, describe
from orchard.engine.joining import wait_for_sites
from orchard.engine.journal import Journal, WatchedPost
from orchard.engine.progress import Reporter
from orchard.engine.rounds import Rounds, summarize
from orchard.engine.secrecy import Secrecy
from orchard.engine.simulator import Schedule, sample_clients
from orchard.engine.stragglers import Stragglers
from orchard.results import MetricsLog, write_json
from orchard.seeding import Seeds
from orchard.server.admission import Admission
from orchard.server.beside import Bounds
from orchard.server.checkpoint import ServerState, load_checkpoint, save_checkpoint
from orchard.strategies.strategy import Strategy

if TYPE_CHECKING:
    from orchard.engine.secret_rounds import SecretRounds

log = logging.getLogger(__name__)
Begin: TypeAlias = Callable[[int], tuple[Strategy, ServerState]]
SITES_FILE = "sites.json"


@dataclass
class Coordinator:
    """Runs the rounds of one federation.

    Attributes:
        schedule: What happens in which round.
        channel: Encodes tasks and decodes updates.
        seeds: The run's randomness.
        folder: The run's folder, as the simulator writes it, with ``audit.jsonl`` and
            ``sites.json`` beside.
        about: What must be the same to resume.
        recipe: The recipe as text, for the sites.
        run: Names the run to the sites; the same when it is resumed.
        base_digest: Of the base model, which every site must hold too.
        patience: How long is waited for what.
        admission: Which updates are let in.
        reporter: Shows progress.
        bounds: What an update may be beside the others of its round.
        max_move: Largest L2 norm by which a round moves the global tree; 0 = see ``check_move``.
        ranges: What sites may measure.
        methods: Methods that do not come with Orchard to the digests of their sources, which every
            site must have too.
        has_preferences: See ``Intake``.
        secrecy: How this coordinator is kept from seeing single updates; None = it sees them.
    """

    schedule: Schedule
    channel: Channel
    seeds: Seeds
    folder: Path
    about: Mapping[str, Any]
    recipe: str
    run: str
    base_digest: str
    patience: Patience
    admission: Admission
    reporter: Reporter
    bounds: Bounds = field(default_factory=Bounds)
    max_move: float = 0.0
    ranges: Ranges = field(default_factory=measured_ranges)
    methods: Mapping[str, str] = field(default_factory=dict)
    has_preferences: bool = False
    secrecy: Secrecy | None = None

    def __post_init__(self) -> None:
        """Open the logs."""
        self._log = MetricsLog(self.folder / "metrics.jsonl")
        self._audit = AuditLog(self.folder / "audit.jsonl")
        self._journal = Journal(self.folder)
        self._intake = Intake(
            self.channel,
            self.admission,
            self.base_digest,
            inbox=Inbox(self.folder / "inbox"),
            audit=self._audit,
            ranges=self.ranges,
            has_preferences=self.has_preferences,
            journal=self._journal,
            is_secret=self.secrecy is not None,
        )
        self._secret: SecretRounds | None = None
        if self.secrecy:
            # What it takes is an extra.
            from orchard.engine.secret_rounds import SecretRounds

            digest = self.about["recipe_digest"]
            self._secret = SecretRounds(self.secrecy, self.run, digest, self.folder)
        self._stragglers = Stragglers()

    def join(self, post: Post, *, num_sites: int) -> dict[str, int | None]:
        """Wait for the sites of the run, and return their names in order, with their examples.

        A resumed run has the sites it began with, and each must have as many examples as then.

        Args:
            post: Carries requests.
            num_sites: How many are expected; the wait ends when they have joined.

        Raises:
            TimeoutError: Too few joined in time.
        """
        path = self.folder / SITES_FILE
        known: dict[str, int | None] = {}
        if path.exists():
            saved = json.loads(path.read_text())
            known = saved if isinstance(saved, dict) else dict.fromkeys(saved)
        request = Request({"kind": "join", **self._what_runs()})
        joined = wait_for_sites(
            post,
            request,
            known=known,
            expected=len(known) or num_sites,
            patience=self.patience,
            intake=self._intake,
            reporter=self.reporter,
        )
        sites = known or dict(sorted(joined.items()))
        if not known:
            write_json(path, sites)
        return sites

    def _rounds(self, joined: Mapping[str, int | None]) -> Rounds:
        rounds = Rounds(
            self._intake,
            self._log,
            self.reporter,
            bounds=self.bounds,
            max_move=self.max_move,
            staleness=self.patience.staleness,
        )
        rounds.join(joined)
        return rounds

    def _what_runs(self) -> dict[str, Any]:
        """Return what every request names the run by."""
        own = {"methods": dict(self.methods)} if self.methods else {}
        return {"run": self.run, "recipe": self.recipe, **own}

    def run_rounds(self, post: Post, begin: Begin, *, num_sites: int) -> ServerState:
        """Run all rounds that are not yet checkpointed, and the last evaluation.

        Args:
            post: Carries requests.
            begin: From the number of sites to the method and the state of round 0, which is used
                where there is no checkpoint.
            num_sites: See ``join``.

        Raises:
            TimeoutError: Too few sites joined, or answered, in time.
            ValueError: The checkpoint belongs to another run.
        """
        post = WatchedPost(post, self._journal.reading)
        self._intake.set_apart_blamed()
        saved = load_checkpoint(self.folder / "checkpoints", about=self.about)
        done = saved.round_number if saved else 0
        self._log.rewind(done)
        self.reporter.begin(
            title="coordinated", num_rounds=self.schedule.num_rounds, round_number=done
        )
        try:
            joined = self.join(post, num_sites=num_sites)
            sites, rounds = tuple(joined), self._rounds(joined)
            strategy, state = begin(len(sites))
            state = saved or state
            while state.round_number < self.schedule.num_rounds:
                state = self._round(strategy, post, sites, state, rounds)
            if due := self._due(sites, state.round_number):
                self._evaluate(post, sites, state, due)
        finally:
            self.reporter.end()
        return state

    def _round(
        self,
        strategy: Strategy,
        post: Post,
        sites: Sequence[str],
        state: ServerState,
        rounds: Rounds,
    ) -> ServerState:
        """Run one round, again where too few answered, and commit it."""
        started = time.monotonic()
        number, fewest = state.round_number + 1, max(self.patience.quorum, 1)
        if self.secrecy:
            fewest = max(fewest, self.secrecy.least)
        self.channel.reset()
        inbox, asked = self._intake.inbox, self._asked(number)
        arrived = inbox.take_up(
            sites,
            round_number=number,
            look=lambda message, own: self._intake.look_again(message, own, asked, state.shared),
            refuse=lambda own, error: self._intake.set_apart(own, describe(error)),
        )
        self.channel.uplink_bytes += sum(own.num_bytes for own in arrived)
        refused = set(inbox.set_apart_in(number))
        refused |= self._secret.barred if self._secret else frozenset()
        task = self.schedule.task(number, state.shared)
        broadcast = self.channel.broadcast(task, state.held)
        for attempt in range(1, self.patience.attempts + 1):
            settled = {own.client_id for own in arrived} | refused
            arrived += self._ask_round(post, sites, state, broadcast, settled)
            arrived, odd = rounds.settle(arrived, sites)
            refused |= odd
            has_time = time.monotonic() - started < self.patience.round_seconds
            wanted = self._wanted(sites, number, refused) if has_time else 0
            enough = max(wanted if attempt < self.patience.attempts else 0, fewest)
            made = None
            if len(arrived) >= enough and self._secret:
                made, summed = self._secret.combine(
                    post,
                    rounds,
                    strategy,
                    state,
                    broadcast,
                    arrived,
                    cohort_size=self._cohort_size(sites),
                    patience=self.patience,
                )
                refused |= summed.excluded
                gone = summed.excluded | summed.untrained
                inbox.throw_away([own for own in arrived if own.client_id in gone])
                arrived = [own for own in arrived if own.client_id not in gone]
            elif len(arrived) >= enough:
                made = rounds.combine(strategy, state, arrived)
            if made is not None:
                refused |= {own.client_id for own, _ in made.culprits}
                arrived = list(made.counted)
                if len(arrived) >= fewest or self._secret:
                    break
            log.warning(
                "round %d, attempt %d: %d of at least %d updates",
                number,
                attempt,
                len(arrived),
                enough,
            )
            time.sleep(self.patience.poll_seconds * 2**attempt)
        else:
            raise TimeoutError(
                f"round {number} must have at least {fewest} updates, got {len(arrived)} in "
                f"{self.patience.attempts} attempts; look at audit.jsonl for the reasons, and "
                "start the coordinator again with --resume"
            )
        state = made.state
        if self.channel.differences is not None:
            holders = tuple(own.client_id for own in arrived)
            state = replace(state, held=broadcast.task.shared, holders=holders)
        seconds = time.monotonic() - started
        summary = summarize(made.lines, arrived, self.channel, seconds=seconds)
        for line in (*made.lines, {"kind": "round", "round": number, **summary, **made.covered}):
            self._log.append(line)
        keep = self.schedule.keep_rounds
        save_checkpoint(self.folder / "checkpoints", state, about=self.about, keep=keep)
        inbox.throw_away(arrived)
        self._journal.forget()
        self.reporter.completed(
            number,
            loss=summary.get("round/train_loss"),
            uplink_bytes=int(summary["round/uplink_bytes"]),
        )
        return state

    def _cohort_size(self, sites: Sequence[str]) -> int:
        return self.schedule.clients_per_round or len(sites)

    def _wanted(self, sites: Sequence[str], number: int, refused: Set[str]) -> int:
        """Return how many updates a round is tried for; those set apart are not asked again."""
        cohort = set(sample_clients(sites, self.schedule, self.seeds, number))
        return min(self.patience.wanted, len(cohort - refused))

    def _asked(
        self, round_number: int, *, trains: bool = True, models: Collection[str] = ()
    ) -> Asked:
        local = "local" in self.schedule.models and self.schedule.has_evaluation(round_number)
        return Asked(round_number, trains=trains, models=models, local=local)

    def _ask_round(
        self,
        post: Post,
        sites: Sequence[str],
        state: ServerState,
        broadcast: Broadcast,
        settled: Set[str],
    ) -> list[Arrived]:
        """Ask the cohort to train and, where it is due, sites to evaluate.

        Args:
            post: Carries requests.
            sites: Of the run, in order.
            state: Before the round.
            broadcast: The round's task.
            settled: Sites whose update is there or was set apart; they are not asked to train.

        Returns:
            The updates that were let in, those of earlier rounds among them.
        """
        number = state.round_number + 1
        due = self._due(sites, state.round_number)
        arrived = self._collect_late(post, state)
        busy = self._stragglers.busy
        cohort = set(sample_clients(sites, self.schedule, self.seeds, number)) - settled - busy
        away = busy | self._intake.inbox.set_apart_in(number)
        asked = {
            site: self._asked(number, trains=site in cohort, models=due.get(site, ()))
            for site in sites
            if site in cohort or (site in due and site not in away)
        }
        late: dict[str, str] = {}
        measured: dict[str, RoundDone] = {}

        def request(site: str, body: bytes) -> Request:
            return self._request(site, sites, body, asked[site])

        # Who is sent differences may lack what they are to, once; it is asked beside the others.
        holders = state.holders if broadcast.differences is not None else ()
        may_lack = {site for site in asked if site in holders}
        lacking: dict[str, Request] = {}

        def asked_again(online: Collection[str] = ()) -> dict[str, Request]:
            found = dict(lacking)
            lacking.clear()
            return found

        def answers() -> Iterator[Answer]:
            end = time.monotonic() + self.patience.round_seconds
            requests: Mapping[str, Request] = {
                site: request(site, broadcast.since if site in may_lack else broadcast.whole)
                for site in asked
            }
            while requests:
                left = max(end - time.monotonic(), 0.0)
                patience = self.patience
                yield from exchange(
                    post, requests, patience, seconds=left, late=late, more=asked_again
                )
                requests = asked_again()

        self.reporter.working(f"{len(cohort)} sites train", share=0.0)
        num_settled = 0
        for answer in answers():
            site = answer.site
            taken = self._intake.take(
                answer, asked[site], state.shared, is_last=site not in may_lack
            )
            if taken.lacks_values:
                may_lack.remove(site)
                lacking[site] = request(site, broadcast.whole)
                continue
            if taken.arrived is not None:
                arrived.append(taken.arrived)
            if taken.reply is not None:
                measured[site] = taken.reply
            num_settled += 1
            self.reporter.working(
                f"{num_settled} of {len(asked)} sites answered", share=num_settled / len(asked)
            )
        self._stragglers.add(late, round_number=number)
        self._log_evaluation(sites, state, measured)
        return arrived

    def _due(self, sites: Sequence[str], round_number: int) -> dict[str, tuple[str, ...]]:
        return models_due(self.schedule, self._log, sites, round_number=round_number)

    def _exchange(
        self, post: Post, requests: Mapping[str, Request], late: dict[str, str] | None = None
    ) -> Iterator[Answer]:
        return exchange(
            post, requests, self.patience, seconds=self.patience.round_seconds, late=late
        )

    def _request(self, site: str, sites: Sequence[str], body: bytes, asked: Asked) -> Request:
        """Return what a site is asked in a round, and write it down."""
        self.channel.downlink_bytes += len(body)
        self._audit.write(
            "asked",
            site=site,
            round=asked.round_number,
            trains=asked.trains,
            evaluates=list(asked.models),
            bytes=len(body),
            sha256=content_digest(body),
        )
        header = {
            "kind": "round",
            **self._what_runs(),
            "site": site,
            "index": sites.index(site),
            "num_clients": len(sites),
            "round": asked.round_number,
            "evaluate": list(asked.models),
            "train": asked.trains,
        }
        return Request(header, body)

    def _evaluate(
        self,
        post: Post,
        sites: Sequence[str],
        state: ServerState,
        due: Mapping[str, Sequence[str]],
    ) -> None:
        """Evaluate the last round's models at the sites that have not yet."""
        number = state.round_number + 1
        task = Task(number, state.shared, LocalSettings(0, 0, 0.0))
        body = self.channel.broadcast(task, {}).whole
        away = self._intake.inbox.set_apart_in(number)
        asked = {
            site: self._asked(number, trains=False, models=models)
            for site, models in due.items()
            if site not in away
        }
        requests = {site: self._request(site, sites, body, own) for site, own in asked.items()}
        measured: dict[str, RoundDone] = {}
        self.reporter.working(f"{len(asked)} sites evaluate", share=0.0)
        for answer in self._exchange(post, requests):
            taken = self._intake.take(answer, asked[answer.site], state.shared)
            if taken.reply is not None:
                measured[answer.site] = taken.reply
        self._log_evaluation(sites, state, measured)

    def _log_evaluation(
        self, sites: Sequence[str], state: ServerState, replies: Mapping[str, RoundDone]
    ) -> None:
        """Log what sites measured of the models after a round."""
        own = {site: replies[site] for site in sites if site in replies}
        clients = {site: dict(reply.evaluation) for site, reply in own.items() if reply.evaluation}
        if clients:
            self._log.append(
                {
                    "kind": "evaluation",
                    "round": state.round_number,
                    "seconds": max(own[site].evaluation_seconds for site in clients),
                    "clients": clients,
                }
            )

    def _collect_late(self, post: Post, state: ServerState) -> list[Arrived]:
        """Take or drop what came after its round's deadline."""
        arrived: list[Arrived] = []
        for late in self._stragglers.collect(post):
            if not self.patience.accept_late:
                reason = f"came late, in round {state.round_number + 1}; dropped"
                self._intake.refuse(late.site, late.round_number, reason)
                continue
            reply = late.reply
            answer = Answer(late.site, reply.header, reply.body, reply.error)
            # What it measured is of a model that has moved on; it is looked at and not kept.
            asked = self._asked(late.round_number, models=("base", "global", "personal"))
            taken = self._intake.take(answer, asked, state.shared)
            if taken.arrived is not None:
                arrived.append(taken.arrived)
        return arrived
