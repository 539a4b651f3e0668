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
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from orchard.communication.audit import AuditLog, content_digest
from orchard.communication.channel import Broadcast, Channel
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.engine.coverage import Coverage
from orchard.engine.exchange import Answer, Patience, Post, Request, exchange
from orchard.engine.inbox import Arrived, Inbox
from orchard.engine.intake import Intake
from orchard.engine.joining import wait_for_sites
from orchard.engine.progress import Reporter
from orchard.engine.simulator import Schedule, rounds_since_sent, sample_clients
from orchard.engine.stragglers import Stragglers
from orchard.process_memory import peak_memory_bytes
from orchard.results import MetricsLog, write_json
from orchard.seeding import Seeds
from orchard.server.admission import Admission
from orchard.server.checkpoint import ServerState, load_checkpoint, save_checkpoint
from orchard.strategies.strategy import Strategy, update_server

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
        methods: Methods that do not come with Orchard to the digests of their sources, which every
            site must have too.
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
    methods: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open the logs."""
        self._log = MetricsLog(self.folder / "metrics.jsonl")
        self._audit = AuditLog(self.folder / "audit.jsonl")
        self._intake = Intake(
            self.channel,
            self.admission,
            self.base_digest,
            inbox=Inbox(self.folder / "inbox"),
            audit=self._audit,
        )
        self._stragglers = Stragglers()

    def join(self, post: Post, *, num_sites: int) -> tuple[str, ...]:
        """Wait for the sites of the run, and return their names in order.

        A resumed run has the sites it began with.

        Args:
            post: Carries requests.
            num_sites: How many are expected; the wait ends when they have joined.

        Raises:
            TimeoutError: Too few joined in time.
        """
        path = self.folder / SITES_FILE
        known = tuple(json.loads(path.read_text())) if path.exists() else ()
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
        if known:
            return known
        sites = tuple(sorted(joined))
        write_json(path, list(sites))
        return sites

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
        saved = load_checkpoint(self.folder / "checkpoints", about=self.about)
        done = saved.round_number if saved else 0
        self._log.rewind(done)
        self.reporter.begin(
            title="coordinated", num_rounds=self.schedule.num_rounds, round_number=done
        )
        try:
            sites = self.join(post, num_sites=num_sites)
            strategy, state = begin(len(sites))
            state = saved or state
            while state.round_number < self.schedule.num_rounds:
                state = self._round(strategy, post, sites, state)
            if models := self._models_due(state.round_number):
                self._evaluate(post, sites, state, models)
        finally:
            self.reporter.end()
        return state

    def _models_due(self, round_number: int) -> tuple[str, ...]:
        """Return which models are still to be evaluated as they are after a round."""
        done = {
            model
            for line in self._log.read()
            if line["kind"] == "evaluation" and line["round"] == round_number
            for values in line["clients"].values()
            for model in {key.partition("/")[0] for key in values}
        }
        due = set()
        if round_number == 0:
            due = set(self.schedule.models) & {"base"}
        elif self.schedule.has_evaluation(round_number):
            due = set(self.schedule.models) & {"global", "personal"}
        return tuple(sorted(due - done))

    def _round(
        self, strategy: Strategy, post: Post, sites: Sequence[str], state: ServerState
    ) -> ServerState:
        """Run one round, again where too few answered, and commit it."""
        started = time.monotonic()
        number, fewest = state.round_number + 1, max(self.patience.quorum, 1)
        self.channel.reset()
        arrived = self._intake.inbox.take_up(sites, round_number=number)
        self.channel.uplink_bytes += sum(own.num_bytes for own in arrived)
        task = self.schedule.task(number, state.shared)
        broadcast = self.channel.broadcast(task, state.held)
        for attempt in range(1, self.patience.attempts + 1):
            have = {own.client_id for own in arrived}
            arrived += self._ask_round(post, sites, state, broadcast, have)
            if len(arrived) >= fewest:
                break
            log.warning(
                "round %d, attempt %d: %d of at least %d updates",
                number,
                attempt,
                len(arrived),
                fewest,
            )
            time.sleep(self.patience.poll_seconds * 2**attempt)
        else:
            raise TimeoutError(
                f"round {number} must have at least {fewest} updates, got {len(arrived)} in "
                f"{self.patience.attempts} attempts; look at audit.jsonl for the reasons, and "
                "start the coordinator again with --resume"
            )
        order = {site: index for index, site in enumerate(sites)}
        arrived.sort(key=lambda own: (order[own.client_id], own.round_number))
        lines: list[dict[str, Any]] = []
        coverage = Coverage(state.shared, rounds_since_sent(self._log))
        state = update_server(strategy, state, self._read(arrived, number, lines, coverage))
        if self.channel.differences is not None:
            holders = tuple(own.client_id for own in arrived)
            state = replace(state, held=broadcast.task.shared, holders=holders)
        summary = self._summarize(lines, seconds=time.monotonic() - started) | coverage.summary()
        for line in (*lines, {"kind": "round", "round": number, **summary}):
            self._log.append(line)
        save_checkpoint(self.folder / "checkpoints", state, about=self.about)
        self._intake.inbox.throw_away(arrived)
        self.reporter.completed(
            number,
            loss=summary.get("round/train_loss"),
            uplink_bytes=int(summary["round/uplink_bytes"]),
        )
        return state

    def _ask_round(
        self,
        post: Post,
        sites: Sequence[str],
        state: ServerState,
        broadcast: Broadcast,
        have: Set[str],
    ) -> list[Arrived]:
        """Ask the cohort to train and, where it is due, everybody to evaluate.

        Args:
            post: Carries requests.
            sites: Of the run, in order.
            state: Before the round.
            broadcast: The round's task.
            have: Sites whose update is there; they are not asked to train again.

        Returns:
            The updates that were let in, those of earlier rounds among them.
        """
        number = state.round_number + 1
        models = self._models_due(state.round_number)
        arrived = self._collect_late(post, state)
        busy = self._stragglers.busy
        cohort = set(sample_clients(sites, self.schedule, self.seeds, number)) - have - busy
        asked = [site for site in sites if site in cohort or (models and site not in busy)]
        late: dict[str, str] = {}
        measured: dict[str, Mapping[str, Any]] = {}

        def request(site: str, body: bytes) -> Request:
            return self._request(site, sites, number, body, models, trains=site in cohort)

        requests = {
            site: request(site, broadcast.since if site in state.holders else broadcast.whole)
            for site in asked
        }
        self.reporter.working(f"{len(cohort)} sites train", share=0.0)
        for answer in self._exchange(post, requests, late):
            if answer.header.get("lacks_values"):  # it lost what differences are to
                whole = {answer.site: request(answer.site, broadcast.whole)}
                (answer,) = self._exchange(post, whole, late)
            measured[answer.site] = answer.header
            if answer.site in cohort or answer.failure or "refused" in answer.header:
                arrived += self._intake.admit(answer, state.shared, round_number=number)
            self.reporter.working(
                f"{len(measured)} of {len(asked)} sites answered",
                share=len(measured) / len(asked),
            )
        self._stragglers.add(late, round_number=number)
        self._log_evaluation(sites, state, measured)
        return arrived

    def _exchange(
        self, post: Post, requests: Mapping[str, Request], late: dict[str, str] | None = None
    ) -> Iterator[Answer]:
        return exchange(
            post, requests, self.patience, seconds=self.patience.round_seconds, late=late
        )

    def _request(
        self,
        site: str,
        sites: Sequence[str],
        round_number: int,
        body: bytes,
        models: Sequence[str],
        *,
        trains: bool,
    ) -> Request:
        """Return what a site is asked in a round, and write it down."""
        self.channel.downlink_bytes += len(body)
        self._audit.write(
            "asked",
            site=site,
            round=round_number,
            trains=trains,
            evaluates=list(models),
            bytes=len(body),
            sha256=content_digest(body),
        )
        header = {
            "kind": "round",
            **self._what_runs(),
            "site": site,
            "index": sites.index(site),
            "num_clients": len(sites),
            "round": round_number,
            "evaluate": list(models),
            "train": trains,
        }
        return Request(header, body)

    def _evaluate(
        self, post: Post, sites: Sequence[str], state: ServerState, models: Sequence[str]
    ) -> None:
        """Evaluate the last round's models at all sites."""
        number = state.round_number + 1
        task = Task(number, state.shared, LocalSettings(0, 0, 0.0))
        body = self.channel.broadcast(task, {}).whole
        requests = {
            site: self._request(site, sites, number, body, models, trains=False) for site in sites
        }
        measured: dict[str, Mapping[str, Any]] = {}
        self.reporter.working(f"{len(sites)} sites evaluate", share=0.0)
        for answer in self._exchange(post, requests):
            measured[answer.site] = answer.header
            if reason := answer.failure or str(answer.header.get("refused", "")):
                self._intake.refuse(answer.site, number, reason)
        self._log_evaluation(sites, state, measured)

    def _log_evaluation(
        self, sites: Sequence[str], state: ServerState, headers: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Log what sites measured of the models after a round."""
        measured = self._intake.measured(sites, headers, round_number=state.round_number)
        if measured.clients:
            self._log.append(
                {
                    "kind": "evaluation",
                    "round": state.round_number,
                    "seconds": measured.seconds,
                    "clients": measured.clients,
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
            arrived += self._intake.admit(answer, state.shared, round_number=late.round_number)
        return arrived

    def _read(
        self,
        arrived: Sequence[Arrived],
        round_number: int,
        lines: list[dict[str, Any]],
        coverage: Coverage,
    ) -> Iterator[Update]:
        """Yield updates from disk, one at a time, and note their metrics."""
        for position, own in enumerate(arrived):
            update = self.channel.unpack_update(own.path.read_bytes())
            if own.round_number != round_number:
                discount = self.patience.staleness ** (round_number - own.round_number)
                weight = {name: discount * value for name, value in update.weight.items()}
                update = replace(update, weight=weight)
            lines.append(
                {
                    **update.metrics,
                    "kind": "client",
                    "round": round_number,
                    "client": update.client_id,
                }
            )
            coverage.add(update)
            self.reporter.working("updates are aggregated", share=position / len(arrived))
            yield update

    def _summarize(self, lines: Sequence[Mapping[str, Any]], *, seconds: float) -> dict[str, Any]:
        """Return one round's numbers; sites work at the same time, so the slowest one counts."""
        losses = [line["client/train_loss"] for line in lines if "client/train_loss" in line]
        busy = [
            math.fsum(
                line.get(f"client/{what}_seconds", 0.0)
                for what in ("prepare", "train", "evaluation")
            )
            for line in lines
        ]
        return {
            **({"round/train_loss": math.fsum(losses) / len(losses)} if losses else {}),
            "round/num_clients": len(lines),
            "round/num_dropped_out": len(lines) - len(losses),
            "round/seconds": seconds,
            "round/prepare_seconds": max(line.get("client/prepare_seconds", 0.0) for line in lines),
            "round/train_seconds": max(line.get("client/train_seconds", 0.0) for line in lines),
            "round/evaluation_seconds": 0.0,
            "round/overhead_seconds": seconds - max(busy),
            "round/uplink_bytes": self.channel.uplink_bytes,
            "round/downlink_bytes": self.channel.downlink_bytes,
            "round/peak_memory_bytes": peak_memory_bytes(),
        }
