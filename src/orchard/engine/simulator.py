"""The engine of one machine: clients have their turns in this process or in workers beside it.

A round is committed by its checkpoint. Whatever a crash interrupts is run again from the last
checkpoint, with the same draws and the same personal tensors, so a resumed run ends with the
tensors of an uninterrupted one.
"""

from __future__ import annotations

import itertools
import math
import secrets
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from orchard.communication.channel import Broadcast, Channel
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.engine.coverage import Coverage
from orchard.engine.progress import Reporter
from orchard.engine.secrecy import Secrecy, sum_in_secret
from orchard.engine.turns import Crew, Turn, WorkerFacts
from orchard.process_memory import peak_memory_bytes
from orchard.results import Metrics, MetricsLog
from orchard.seeding import Seeds
from orchard.server.checkpoint import ServerState, load_checkpoint, save_checkpoint
from orchard.strategies.strategy import Strategy, update_server
from orchard.trees import Tree

if TYPE_CHECKING:
    from orchard.engine.secret_sum import SecretRound


@dataclass(frozen=True)
class Schedule:
    """What happens in which round.

    Attributes:
        num_rounds: Rounds of the run.
        clients_per_round: Size of the cohort; 0 = all clients.
        steps: Optimizer steps per client and round; 0 where epochs rules.
        epochs: Passes over the data per client and round; 0 where steps rules.
        lr: Learning rate of the first round.
        lr_min: Where the cosine ends.
        is_cosine: Whether the learning rate follows a cosine over rounds, or stays.
        evaluate_every: Rounds between evaluations; 0 = only after the last.
        models: Which models are evaluated.
        keep_rounds: So many checkpoints stay, and two at least.
        is_poisson: Whether each client is in the cohort or not by itself, with the same
            probability: a cohort has ``clients_per_round`` only on average, and may be empty.
        is_secret: Whether the seed does not tell who is in a Poisson cohort.
        final_rounds: So many of the last rounds have a cosine of their own, which starts anew.
        secrecy: How the server is kept from seeing single updates; None = it sees them.
        arriving: Clients that are in the cohorts of the arrival rounds alone.
        arrival_rounds: So many of the last rounds are theirs, with a cosine of their own.
    """

    num_rounds: int
    clients_per_round: int
    steps: int
    epochs: int
    lr: float
    lr_min: float
    is_cosine: bool
    evaluate_every: int
    models: tuple[str, ...]
    keep_rounds: int = 0
    is_poisson: bool = False
    is_secret: bool = False
    final_rounds: int = 0
    secrecy: Secrecy | None = None
    arriving: frozenset[str] = frozenset()
    arrival_rounds: int = 0

    def local(self, round_number: int) -> LocalSettings:
        """Return how clients train in a round.

        Source: FLEx (Liu et al., 2025, arXiv:2506.00965): the learning rate follows a cosine over
        rounds and is constant within one; the first round has ``lr`` itself.
        """
        lr = self.lr
        if self.is_cosine:
            trained = self.num_rounds - self.arrival_rounds
            ends = [0, trained - self.final_rounds, trained, self.num_rounds]
            first, end = next(
                (first, end)
                for first, end in itertools.pairwise(ends)
                if first < round_number <= end
            )
            length = end - first
            angle = math.pi * (round_number - first - 1) / length
            lr = self.lr_min + 0.5 * (self.lr - self.lr_min) * (1 + math.cos(angle))
        return LocalSettings(steps=self.steps, epochs=self.epochs, learning_rate=lr)

    def task(self, round_number: int, shared: Tree) -> Task:
        """Return what a round asks of its cohort, given the global values before it."""
        return Task(
            round_number=round_number,
            shared=shared,
            settings=self.local(round_number),
            evaluate_local="local" in self.models and self.has_evaluation(round_number),
        )

    def taking_part(self, clients: Sequence[str], round_number: int) -> list[str]:
        """Return of whom the cohort of a round is drawn: those that arrive, or all others."""
        is_theirs = round_number > self.num_rounds - self.arrival_rounds
        return [client for client in clients if (client in self.arriving) == is_theirs]

    def has_evaluation(self, round_number: int) -> bool:
        """Say whether models are evaluated after this round."""
        is_due = self.evaluate_every > 0 and round_number % self.evaluate_every == 0
        return round_number == self.num_rounds or is_due


_AnyClient = TypeVar("_AnyClient")


def sample_clients(
    clients: Sequence[_AnyClient], schedule: Schedule, seeds: Seeds, round_number: int
) -> list[_AnyClient]:
    """Draw the cohort of a round, in the order of ``clients``, which may be their names."""
    size = min(schedule.clients_per_round or len(clients), len(clients))
    if schedule.is_poisson:
        own = np.random.default_rng(secrets.randbits(128)) if schedule.is_secret else None
        draws = own or seeds.generator("cohort", round_number)
        is_in = draws.random(len(clients)) < size / len(clients)
        return [client for client, takes_part in zip(clients, is_in, strict=True) if takes_part]
    drawn = seeds.generator("cohort", round_number).choice(len(clients), size, replace=False)
    return [clients[index] for index in sorted(int(i) for i in drawn)]


def run_rounds(
    strategy: Strategy,
    crew: Crew,
    state: ServerState,
    *,
    schedule: Schedule,
    channel: Channel,
    seeds: Seeds,
    folder: Path,
    about: Mapping[str, Any],
    reporter: Reporter,
    title: str,
    cost: Callable[[int], float] | None = None,
) -> ServerState:
    """Run all rounds that are not yet checkpointed in ``folder``, and the last evaluation.

    Args:
        strategy: The method.
        crew: All clients, here or in other processes.
        state: The state of round 0, used where there is no checkpoint.
        schedule: What happens in which round.
        channel: The way between server and clients.
        seeds: The run's randomness.
        folder: The run's folder: ``metrics.jsonl`` and ``checkpoints`` are written here.
        about: What must be the same to resume.
        reporter: Shows progress.
        title: How the run is called there.
        cost: From a number of rounds to the epsilon that they cost; None = nothing is private.

    Returns:
        The state after the last round.

    Raises:
        ValueError: The checkpoint belongs to another run.
        Exception: Whatever a client raises, with a note of round, client and stage.
    """
    checkpoints = folder / "checkpoints"
    log = MetricsLog(folder / "metrics.jsonl")
    state = load_checkpoint(checkpoints, about=about) or state
    log.rewind(state.round_number)
    reporter.begin(title=title, num_rounds=schedule.num_rounds, round_number=state.round_number)
    try:
        if "base" in schedule.models and not _has_evaluation(log, 0):
            log.append(_evaluate(crew, state, channel, {"base"}, reporter))
        after_aggregation = set(schedule.models) & {"global", "personal"}
        since_sent = rounds_since_sent(log)
        mark = time.monotonic()
        for round_number in range(state.round_number + 1, schedule.num_rounds + 1):
            channel.reset()
            is_evaluated = schedule.has_evaluation(round_number)
            task = schedule.task(round_number, state.shared)
            cohort = sample_clients(
                schedule.taking_part(crew.client_ids, round_number), schedule, seeds, round_number
            )
            tally, coverage = _Tally(), Coverage(state.shared, since_sent)
            broadcast = channel.broadcast(task, state.held)
            # Lines are written as they come: until the round is committed, resuming drops them.
            records = log, tally, coverage
            secret = schedule.secrecy.begin(cohort, state.shared) if schedule.secrecy else None
            updates = _train_cohort(
                crew, cohort, broadcast, state.holders, records, reporter, secret
            )
            state = update_server(strategy, state, updates)
            if channel.differences is not None:
                state = replace(state, held=broadcast.task.shared, holders=tuple(cohort))
            if is_evaluated and after_aggregation:
                line = _evaluate(crew, state, channel, after_aggregation, reporter)
                tally.evaluation_seconds.append(line["seconds"])
                log.append(line)
            # A round's time runs from line to line, so it has the checkpoint before it in it.
            now = time.monotonic()
            covered = coverage.summary()
            since_sent = covered.get("rounds_since_sent", {})
            summary = tally.summary(channel, seconds=now - mark, workers=crew.workers) | covered
            if cost is not None:
                summary["round/epsilon"] = cost(round_number)
            mark = now
            log.append({"kind": "round", "round": round_number, **summary})
            save_checkpoint(checkpoints, state, about=about, keep=schedule.keep_rounds)
            reporter.completed(
                round_number,
                loss=summary.get("round/train_loss"),
                uplink_bytes=int(summary["round/uplink_bytes"]),
            )
    finally:
        reporter.end()
    return state


def _train_cohort(
    crew: Crew,
    cohort: Sequence[str],
    broadcast: Broadcast,
    holders: Collection[str],
    records: tuple[MetricsLog, _Tally, Coverage],
    reporter: Reporter,
    secret: SecretRound | None,
) -> Iterator[Update]:
    """Yield the cohort's updates, each when it is asked for, and record their metrics.

    With a secret sum only their mean, once all of them were sent.
    """
    channel = broadcast.channel
    log, tally, coverage = records

    def receive(turn: Turn) -> Update:
        channel.uplink_bytes += 0 if secret else len(turn.update)
        channel.downlink_bytes += turn.downlink_bytes
        received = channel.unpack_update(turn.update)
        log.append(
            {
                "kind": "client",
                "round": broadcast.task.round_number,
                "client": turn.client_id,
                **received.metrics,
            }
        )
        tally.add(received.metrics, worker=turn.worker)
        if secret is None:
            coverage.add(received)
        return received

    def summed(updates: Iterator[Update], secret: SecretRound) -> Iterator[Update]:
        for total in sum_in_secret(updates, secret, broadcast.task.round_number):
            channel.uplink_bytes += secret.uplink_bytes
            channel.downlink_bytes += secret.downlink_bytes
            coverage.add(total)
            yield total

    def tell(what: str, num_done: int) -> None:
        reporter.working(what, share=num_done / len(cohort))

    updates = map(receive, crew.train(cohort, broadcast, holders, tell))
    return updates if secret is None else summed(updates, secret)


def _evaluate(
    crew: Crew, state: ServerState, channel: Channel, models: set[str], reporter: Reporter
) -> dict[str, Any]:
    """Evaluate models for all clients, as they receive them, and return the line for the log."""
    started = time.monotonic()
    # The round after this state: personal tensors of this round are the newest before it.
    task = Task(state.round_number + 1, state.shared, LocalSettings(0, 0, 0.0))

    def tell(what: str, num_done: int) -> None:
        reporter.working(what, share=num_done / len(crew.client_ids))

    measured = dict(crew.evaluate(channel.broadcast(task, {}).whole, models, tell))
    return {
        "kind": "evaluation",
        "round": state.round_number,
        "seconds": time.monotonic() - started,
        "clients": measured,
    }


def rounds_since_sent(log: MetricsLog) -> dict[str, list[int]]:
    """Return what the last round said of its experts."""
    found: dict[str, list[int]] = {}
    for line in log:
        if line["kind"] == "round":
            found = line.get("rounds_since_sent", {})
    return found


def _has_evaluation(log: MetricsLog, round_number: int) -> bool:
    return any(line["kind"] == "evaluation" and line["round"] == round_number for line in log)


def _numbers() -> array[float]:
    return array("d")


@dataclass(frozen=True)
class _Tally:
    """What a round's clients say of it: numbers alone, since there may be many clients.

    Clients that dropped out have no part in the training loss; without any other there is none.
    """

    losses: array[float] = field(default_factory=_numbers)
    prepare_seconds: array[float] = field(default_factory=_numbers)
    train_seconds: array[float] = field(default_factory=_numbers)
    evaluation_seconds: array[float] = field(default_factory=_numbers)
    busy_seconds: dict[int, float] = field(default_factory=dict)

    def add(self, metrics: Metrics, *, worker: int) -> None:
        """Note one client's, and who computed it."""
        busy = metrics["client/train_seconds"] + metrics.get("client/evaluation_seconds", 0.0)
        self.busy_seconds[worker] = self.busy_seconds.get(worker, 0.0) + busy
        if "client/train_loss" in metrics:
            self.losses.append(metrics["client/train_loss"])
        self.prepare_seconds.append(metrics["client/prepare_seconds"])
        self.train_seconds.append(metrics["client/train_seconds"])
        self.evaluation_seconds.append(metrics.get("client/evaluation_seconds", 0.0))

    def summary(
        self, channel: Channel, *, seconds: float, workers: Sequence[WorkerFacts]
    ) -> dict[str, Any]:
        """Return the round's numbers; overhead is what is neither training nor evaluation.

        With workers, what is not the training and evaluation of the busiest; and the memory of all
        processes is at most the sum of what each had, which counts shared pages for each.
        """
        num_clients, losses = len(self.train_seconds), self.losses
        train_seconds = math.fsum(self.train_seconds)
        evaluation_seconds = math.fsum(self.evaluation_seconds)
        beside = seconds - train_seconds - evaluation_seconds
        peak = peak_memory_bytes()
        if workers:
            common = math.fsum(self.evaluation_seconds[num_clients:])  # of all clients, by all
            beside = seconds - max(self.busy_seconds.values(), default=0.0) - common
            peak += sum(worker.peak_bytes for worker in workers)
        return {
            **({"round/train_loss": math.fsum(losses) / len(losses)} if losses else {}),
            "round/num_clients": num_clients,
            "round/num_dropped_out": num_clients - len(losses),
            "round/seconds": seconds,
            "round/prepare_seconds": math.fsum(self.prepare_seconds),
            "round/train_seconds": train_seconds,
            "round/evaluation_seconds": evaluation_seconds,
            "round/overhead_seconds": beside,
            "round/uplink_bytes": channel.uplink_bytes,
            "round/downlink_bytes": channel.downlink_bytes,
            "round/peak_memory_bytes": peak,
            **({"workers": [asdict(worker) for worker in workers]} if workers else {}),
        }
