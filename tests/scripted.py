"""A federation without models: two honest sites and one that does what a test says, in process.

The sites answer from a script, so that a round costs milliseconds and everything around it is the
coordinator's own: its intake, its checks, its log, its checkpoints and what is resumed from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save

from orchard.communication.audit import read_audit
from orchard.communication.channel import Channel
from orchard.communication.messages import Update
from orchard.engine.coordinator import Coordinator
from orchard.engine.exchange import Patience, Reply
from orchard.engine.progress import Silent
from orchard.engine.simulator import Schedule
from orchard.reports import build_result
from orchard.results import MetricsLog
from orchard.seeding import Seeds
from orchard.server.admission import Admission
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import Strategy, start_server
from orchard.trees import Tree

FIRST, SECOND = "layers.0.q_proj.lora_A", "layers.0.router.1"
SHARED = {FIRST: torch.zeros(4, 3), SECOND: torch.zeros(3)}
# What each one's honest update is full of.
VALUES = {"a": 1.0, "b": 2.0, "bad": 3.0, "c": 1.5, "worse": 2.5}
SITES = ("a", "b", "bad")
TWO_BAD = tuple(VALUES)
BAD = ("bad", "worse")
EXAMPLES = 4

Header: TypeAlias = Mapping[str, Any]
Bad: TypeAlias = Callable[[Header], "tuple[Any, Any] | Reply | None"]
"""From a request to the header and body that the bad site answers; None = it never answers."""


def honest(site: str, round_number: int = 1, *, shared: Tree = SHARED) -> Update:
    delta = {name: torch.full_like(tensor, VALUES[site]) for name, tensor in shared.items()}
    metrics = {"client/train_loss": 1.0, "client/num_examples": float(EXAMPLES)}
    return Update(site, round_number, delta, dict.fromkeys(delta, float(EXAMPLES)), metrics)


def header_of(site: str, asked: Header) -> dict[str, Any]:
    """Return the header of an honest answer to a round's task."""
    header: dict[str, Any] = {"site": site, "base_digest": "base"}
    if asked["evaluate"]:
        header["evaluation"] = {f"{model}/loss": VALUES[site] for model in asked["evaluate"]}
        header["evaluation_seconds"] = VALUES[site]
    return header


def update_header(
    asked: Header, site: str = "bad", *, shared: Tree = SHARED, **facts: Any
) -> dict[str, Any]:
    """Return what an honest update of the bad site says of itself."""
    update = honest(site, asked["round"], shared=shared)
    return {
        "kind": "update",
        "client_id": site,
        "round_number": asked["round"],
        "weight": dict(update.weight),
        "metrics": dict(update.metrics),
        **facts,
    }


def raw_update(header: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> bytes:
    """Return an update whose header somebody wrote who knows the format."""
    delta = honest("bad").delta if tensors is None else tensors
    text = header if isinstance(header, str) else json.dumps(header)
    return save(dict(delta), metadata={"orchard": text})


@dataclass
class ScriptedPost:
    """A post whose sites answer at once.

    Attributes:
        bad: What the bad site does; None = it refuses everything but to join.
        joins: What it answers when it is asked to join; None = an honest answer.
        channel: Encodes honest updates.
        shared: The global tree.
        asked: Site and header of every request, in order.
        slow: Whether a site's answer to a request is not there yet.
        sites: Who is online.
        worse: What another bad site does, which joins as an honest one.
        message: From a site and a round to its honest update; None = ``channel`` encodes it.
    """

    bad: Bad | None
    joins: Callable[[Header], Any] | None = None
    channel: Channel = field(default_factory=Channel)
    shared: Tree = field(default_factory=lambda: SHARED)
    asked: list[tuple[str, Header]] = field(default_factory=list)
    slow: Callable[[str, Header], bool] = lambda site, header: False
    sites: tuple[str, ...] = SITES
    worse: Bad | None = None
    message: Callable[[str, int], bytes] | None = None

    def __post_init__(self) -> None:
        self._waiting: dict[str, tuple[str, Header]] = {}

    def online(self) -> frozenset[str]:
        return frozenset(self.sites)

    def send(self, site: str, header: Header, body: bytes) -> str:
        self.asked.append((site, json.loads(json.dumps(header))))
        ticket = str(len(self.asked))
        self._waiting[ticket] = site, header
        return ticket

    def collect(self, tickets: Collection[str]) -> list[Reply]:
        replies = []
        for ticket in tickets:
            if ticket not in self._waiting or self.slow(*self._waiting[ticket]):
                continue
            reply = self._reply(ticket, *self._waiting[ticket])
            if reply is not None:
                del self._waiting[ticket]
                replies.append(reply)
        return replies

    def _reply(self, ticket: str, site: str, header: Header) -> Reply | None:
        if header["kind"] == "alive":
            return None  # a site handles one request after another
        if header["kind"] == "join":
            if site == "bad" and self.joins is not None:
                return Reply(ticket, self.joins(header))
            return Reply(ticket, {"site": site, "num_examples": EXAMPLES})
        if site not in BAD:
            body = self._honest(site, header["round"]) if header["train"] else b""
            return Reply(ticket, header_of(site, header), body)
        bad = self.bad if site == "bad" else self.worse
        if bad is None:
            return Reply(ticket, {"refused": "away", "site": site})
        answer = bad(header)
        if answer is None or isinstance(answer, Reply):
            return None if answer is None else replace(answer, ticket=ticket)
        return Reply(ticket, *answer)

    def _honest(self, site: str, round_number: int) -> bytes:
        if self.message is not None:
            return self.message(site, round_number)
        return self.channel.pack_update(honest(site, round_number, shared=self.shared))


PATIENCE = Patience(
    quorum=2,
    attempts=1,
    poll_seconds=0.0,
    round_seconds=0.5,
    probe_seconds=9.0,
    join_seconds=0.5,
)


def coordinator(
    folder: Path,
    *,
    num_rounds: int = 2,
    models: tuple[str, ...] = (),
    cohort: int = 0,
    **facts: Any,
) -> Coordinator:
    """Return a coordinator of a scripted federation; ``facts`` are its other attributes."""
    schedule = Schedule(
        num_rounds=num_rounds,
        clients_per_round=cohort,
        steps=1,
        epochs=0,
        lr=0.1,
        lr_min=0.1,
        is_cosine=False,
        evaluate_every=1,
        models=models,
    )
    own: dict[str, Any] = {
        "channel": Channel(),
        "patience": PATIENCE,
        "admission": Admission(max_weight=1e9),
        **facts,
    }
    return Coordinator(
        schedule=schedule,
        seeds=Seeds(0),
        folder=folder,
        about={},
        recipe="",
        run="test",
        base_digest="base",
        reporter=Silent(),
        **own,
    )


def run(
    folder: Path,
    post: ScriptedPost,
    *,
    strategy: Strategy | None = None,
    **facts: Any,
) -> tuple[ServerState, dict[str, Any]]:
    """Run a scripted federation, and return its last state and its result."""
    strategy = strategy or Strategy()
    own = coordinator(folder, channel=post.channel, **facts)
    state = own.run_rounds(
        post,
        lambda number: (strategy, start_server(strategy, post.shared)),
        num_sites=len(post.sites),
    )
    sites = {site: {} for site in post.sites}
    return state, build_result(folder, {"strategy": "fedavg", "seed": 0, "clients": sites})


def metrics_of_honest(folder: Path) -> list[dict[str, Any]]:
    """Return what the log of a run holds of the honest sites, but for times and bytes."""
    found = []
    for line in MetricsLog(folder / "metrics.jsonl").read():
        if line["kind"] == "evaluation":
            own = {site: v for site, v in line["clients"].items() if site not in BAD}
            found.append({"round": line["round"], "clients": own})
        elif line["kind"] == "client" and line["client"] not in BAD:
            found.append(line)
    return found


def reasons(folder: Path, site: str = "bad") -> list[str]:
    """Return why answers of a site were refused, in order."""
    events = read_audit(folder / "audit.jsonl")
    return [e["reason"] for e in events if e["event"] == "refused" and e["site"] == site]
