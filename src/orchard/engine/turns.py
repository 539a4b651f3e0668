"""What one client does in a round and at an evaluation, and who lets clients have their turns.

A crew is all clients of a simulated run, wherever they are computed. Of what it returns everything
is in the order in which it was asked, whoever was ready first: so sums have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from orchard.client.client import Client
from orchard.client.kept_messages import read_task, write_update
from orchard.communication.channel import Broadcast, Channel, MissingCopyError
from orchard.communication.messages import Task
from orchard.results import Metrics
from orchard.strategies.strategy import Strategy, evaluate_client, train_client

COMMON = ("base/", "global/")
"""How measures begin that are the same for all clients with the same held-out examples."""


@dataclass(frozen=True)
class Turn:
    """What came of one client's turn in a round.

    Attributes:
        client_id: Whose.
        update: As it was sent.
        downlink_bytes: What the client was sent.
        worker: The number of who computed it, from 0.
    """

    client_id: str
    update: bytes | bytearray
    downlink_bytes: int
    worker: int = 0


@dataclass(frozen=True)
class WorkerFacts:
    """What one worker has done and needed so far.

    Attributes:
        num_turns: Clients that it trained or evaluated.
        peak_bytes: The largest resident size of its process.
        now_bytes: What it has now, where a page that others have too counts in part; see
            ``process_memory.shared_memory_bytes``.
        num_restarts: How often another process took its place.
    """

    num_turns: int = 0
    peak_bytes: int = 0
    now_bytes: int = 0
    num_restarts: int = 0


Tell: TypeAlias = Callable[[str, int], None]
"""Told what is being done, and how many clients are done."""


class Crew(Protocol):
    """All clients of a run, and who computes them."""

    @property
    def client_ids(self) -> Sequence[str]:
        """The clients, in their order."""
        ...

    @property
    def workers(self) -> Sequence[WorkerFacts]:
        """What each worker has done; empty where this process is the only one."""
        ...

    def train(
        self, cohort: Sequence[str], broadcast: Broadcast, holders: Collection[str], tell: Tell
    ) -> Iterator[Turn]:
        """Yield the turns of a cohort, in its order.

        Args:
            cohort: Clients.
            broadcast: What they are sent.
            holders: Who has the values that the broadcast's differences are from.
            tell: Shows progress.
        """
        ...

    def evaluate(
        self, message: bytes, models: Collection[str], tell: Tell
    ) -> Iterator[tuple[str, Metrics]]:
        """Yield what was measured of models for each client, in their order.

        Args:
            message: A task with whole values; its round is the one after them.
            models: Of ``base``, ``global`` and ``personal``.
            tell: Shows progress.
        """
        ...


def take_turn(
    strategy: Strategy,
    client: Client,
    channel: Channel,
    *,
    since: bytes | None,
    whole: Callable[[], bytes],
    round_number: int,
) -> tuple[bytes, int]:
    """Train one client, and return its encoded update and the bytes that it was sent.

    Args:
        strategy: The method.
        client: Whose turn it is.
        channel: Reads the task and writes the update.
        since: The task as differences, for a client that should have what they are from.
        whole: Returns the task with whole values, which is sent where it has not.
        round_number: Of the task.

    Raises:
        Exception: Whatever the client raises, with a note of round, client and stage.
    """
    try:
        message = whole() if since is None else since
        downlink_bytes = len(message)
        try:
            task = read_task(message, channel, client.store)
        except MissingCopyError:
            message = whole()
            downlink_bytes += len(message)
            task = read_task(message, channel, client.store)
        update = train_client(strategy, client, task)
        return write_update(update, channel, client.store), downlink_bytes
    except Exception as error:
        error.add_note(f"in round {round_number}, client {client.client_id}, local training")
        raise


def take_test(
    strategy: Strategy, client: Client, task: Task, models: Collection[str], *, known: Metrics
) -> dict[str, float]:
    """Evaluate one client's models, as ``evaluate_client`` does.

    Raises:
        Exception: Whatever the client raises, with a note of round, client and stage.
    """
    try:
        return evaluate_client(strategy, client, task, models, known=known)
    except Exception as error:
        after = task.round_number - 1
        error.add_note(f"after round {after}, client {client.client_id}, evaluation")
        raise


def common_part(measured: Metrics) -> dict[str, float]:
    """Return what of a client's measures another one with the same examples has, too."""
    return {name: value for name, value in measured.items() if name.startswith(COMMON)}


def still_wanted(models: Collection[str], known: Metrics) -> set[str]:
    """Return which models are left to evaluate where the common ones may be known."""
    return set(models) - {"base", "global"} if known else set(models)


class Alone:
    """A crew in this process: one client after another on the model that they share."""

    workers: Sequence[WorkerFacts] = ()

    def __init__(self, strategy: Strategy, clients: Sequence[Client], channel: Channel) -> None:
        """Let ``clients`` train by ``strategy`` over ``channel``."""
        self._strategy, self._channel = strategy, channel
        self._clients: Mapping[str, Client] = {client.client_id: client for client in clients}

    @property
    def client_ids(self) -> Sequence[str]:
        """The clients, in their order."""
        return list(self._clients)

    def train(
        self, cohort: Sequence[str], broadcast: Broadcast, holders: Collection[str], tell: Tell
    ) -> Iterator[Turn]:
        """Train each client when its turn is asked for."""

        def turn(client_id: str) -> Turn:
            update, downlink_bytes = take_turn(
                self._strategy,
                self._clients[client_id],
                self._channel,
                since=broadcast.since if client_id in holders else None,
                whole=lambda: broadcast.whole,
                round_number=broadcast.task.round_number,
            )
            return Turn(client_id, update, downlink_bytes)

        for position, client_id in enumerate(cohort):
            tell(f"{client_id} trains", position)
            yield turn(client_id)

    def evaluate(
        self, message: bytes, models: Collection[str], tell: Tell
    ) -> Iterator[tuple[str, Metrics]]:
        """Evaluate each client when it is asked for."""
        task = self._channel.unpack_task(message)
        # The base and the global model are the same for all, and so may be what they are tested on.
        common: dict[tuple[int, ...], dict[str, float]] = {}
        for position, (client_id, client) in enumerate(self._clients.items()):
            tell(f"{client_id} is evaluated", position)
            tests = id(client.test), id(client.retention), id(client.others)
            known = common.get(tests, {})
            wanted = still_wanted(models, known)
            own = take_test(self._strategy, client, task, wanted, known=known)
            common[tests] = common_part(own)
            yield client_id, own
