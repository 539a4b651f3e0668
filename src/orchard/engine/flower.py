"""Flower as the way between the coordinator and its sites.

The coordinator's rounds are its own (``engine/coordinator.py``), because Flower's cannot resume,
wait for ever for nodes that do not come, and take partial replies for whole ones. What is used of
Flower is its Grid: connected nodes, messages, replies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import httpx
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from orchard.communication.door import read_failure, read_introduction
from orchard.communication.readable import readable
from orchard.engine.exchange import Post, Reply
from orchard.engine.flower_messages import pack, unpack

log = logging.getLogger(__name__)
# Flower's codes for a message, its reply or its node that is not there any more.
_LOST = frozenset({3, 4, 5})
_TRAIN, _QUERY = "train", "query"


class FlowerPost:
    """Carries requests to the SuperNodes that are connected to a SuperLink.

    With keys, a node's name is the one that the coordinator registered its key under. Without, it
    is what the node says of itself.
    """

    def __init__(self, grid: Grid) -> None:
        """Use ``grid``, which Flower gives to a ServerApp."""
        self._grid = grid
        self._names: dict[int, str] = {}
        self._introductions: dict[str, int] = {}
        self._nodes: dict[str, int] = {}

    def online(self) -> frozenset[str]:
        """Return the names of the connected sites."""
        present: dict[str, int] = {}
        # Without keys a site that starts again is a new node beside the old one: the newest counts.
        for node in sorted(self._grid.get_nodes(), key=lambda node: node.last_activated_at):
            if name := node.name or self._names.get(node.node_id, ""):
                present[name] = node.node_id
            else:
                self._introduce(node.node_id)
        if self._introductions:
            self._learn_names()
        self._nodes = present
        return frozenset(present)

    def _introduce(self, node_id: int) -> None:
        """Ask a node without a name for the one it has given itself."""
        if node_id not in self._introductions.values():
            message = Message(pack({"kind": "who"}, b""), node_id, _QUERY)
            (ticket,) = self._grid.push_messages([message])
            self._introductions[ticket] = node_id

    def _learn_names(self) -> None:
        for reply in self.collect(list(self._introductions)):
            node_id = self._introductions.pop(reply.ticket)
            if reply.error:
                continue
            try:
                self._names[node_id] = read_introduction(reply.header).site
            except ValueError as error:
                log.warning("node %d has no name: %s", node_id, error)

    def send(self, site: str, header: Mapping[str, Any], body: bytes) -> str:
        """Send a request to a connected site, and return Flower's id of the message."""
        kind = _TRAIN if header.get("train") else _QUERY
        message = Message(pack(header, body), self._nodes[site], kind)
        (ticket,) = self._grid.push_messages([message])
        return ticket

    def collect(self, tickets: Collection[str]) -> list[Reply]:
        """Return the replies that are there."""
        return [reply for ticket in tickets for reply in self._pull(ticket)]

    def _pull(self, ticket: str) -> list[Reply]:
        """Return the reply to one ticket, if it is there.

        One at a time: Flower unpacks what it pulls, and one message that it cannot unpack would
        take all others with it.
        """
        try:
            messages = list(self._grid.pull_messages([ticket]))
        except (OSError, httpx.HTTPError):  # the SuperLink, not who answers
            raise
        except Exception as error:
            what = f"reply must be a message of Flower, got one that does not unpack: {error}"
            return [Reply(ticket, error=readable(what))]
        return [self._read(ticket, message) for message in messages]

    @staticmethod
    def _read(ticket: str, message: Message) -> Reply:
        try:
            if message.has_error():
                error = message.error
                what = readable(f"Flower error {error.code}: {error.reason}")
                return Reply(ticket, error=what, is_lost=error.code in _LOST)
            header, body = unpack(message.content)
            return Reply(ticket, header, body, error=read_failure(header))
        except Exception as error:  # whatever a message does to us is the message's fault
            return Reply(ticket, error=readable(str(error) or type(error).__name__))


class Coordinated(Strategy):
    """A Flower strategy whose rounds are the coordinator's."""

    def __init__(self, run_rounds: Callable[[Post], object]) -> None:
        """Run ``run_rounds``, given the post, when Flower starts the strategy."""
        self._run_rounds = run_rounds

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 0.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds. What they are stands in the recipe; the other arguments are unused."""
        self._run_rounds(FlowerPost(grid))
        return Result()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no message: ``start`` sends them."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return nothing: ``start`` aggregates."""
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no message: a site evaluates and trains on one message."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing: what sites measure stands in ``metrics.jsonl``."""
        return None

    def summary(self) -> None:
        """Print nothing: the coordinator reports its rounds."""
