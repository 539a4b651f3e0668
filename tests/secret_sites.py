"""Secure sums between made-up sites: both sides' code, no model, and a post between them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from orchard.communication import door
from orchard.communication.audit import AuditLog
from orchard.communication.channel import Channel
from orchard.communication.messages import Update
from orchard.deployment.consent import Consent, Refusal, SiteSettings
from orchard.deployment.keys import make_site_keys
from orchard.deployment.site_sums import SiteSums, Waiting
from orchard.engine.exchange import Patience, Reply
from orchard.engine.inbox import Inbox
from orchard.engine.intake import Intake
from orchard.engine.secrecy import Secrecy
from orchard.engine.secret_rounds import SecretTry, Summed, SumTask
from orchard.server.admission import Admission

SHAPES = {"a": (3, 5), "b": (7,)}
TREE = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
STEPS = ("sum_keys", "sum_shares", "sum_vector", "sum_survivors", "sum_end")
Meddle = Callable[[str, dict[str, Any], Callable[[], Reply]], Reply]


def update_of(name: str, number: int = 1) -> Update:
    """Return a site's update, which is its own."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    delta = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    return Update(name, number, delta, dict.fromkeys(delta, 2.0))


@dataclass
class SecretSites:
    """Sites that hold an update each, and the coordinator's way to them.

    Attributes:
        folder: Keys, stores and the coordinator's own files.
        names: Of the sites.
        options: Of every site's consent.
        meddle: Given step, header and what the site would answer, returns what arrives.
    """

    folder: Path
    names: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    meddle: Meddle = lambda step, header, answer: answer()
    num_neighbors: int = 0
    least: int = 3

    def __post_init__(self) -> None:
        self._queue: dict[str, tuple[str, dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self.sent: list[tuple[str, str, bytes]] = []
        for name in self.names:
            make_site_keys(self.folder / "keys", name)
        self.sums = {name: self.start(name) for name in self.names}
        for name in self.names:
            self.train(name)
        self.intake = Intake(
            Channel(),
            Admission(),
            "base",
            inbox=Inbox(self.folder / "inbox"),
            audit=AuditLog(self.folder / "audit.jsonl"),
            is_secret=True,
        )

    def start(self, name: str) -> SiteSums:
        """Start a site, or start it again: what was in its memory is lost."""
        keys = self.folder / "keys" / "sites"
        consent = Consent(
            "own.jsonl", peers=str(keys), signing_key=str(keys / f"{name}.key"), **self.options
        )
        store = self.folder / "stores" / name
        store.mkdir(parents=True, exist_ok=True)
        settings = SiteSettings(name, store, store / "socket", consent)
        return SiteSums(settings, AuditLog(store / "audit.jsonl"))

    def train(self, name: str, number: int = 1, update: Update | None = None) -> None:
        """Have a site hold an update."""
        own = update or update_of(name, number)
        waiting = Waiting(own, SHAPES, "tree", "recipe", 16.0, self.least, self.num_neighbors)
        self.sums[name].keep("run", waiting)

    def restart(self, name: str) -> None:
        """Kill a site and start it again, with an update that it trained anew."""
        self.sums[name] = self.start(name)
        self.train(name)

    # The coordinator's post.

    def online(self) -> frozenset[str]:
        return frozenset(self.names)

    def send(self, site: str, header: Mapping[str, Any], body: bytes) -> str:
        ticket = str(next(self._numbers))
        self._queue[ticket] = site, json.loads(json.dumps(header))
        return ticket

    def collect(self, tickets: Collection[str]) -> list[Reply]:
        found = []
        for ticket in sorted(self._queue.keys() & set(tickets), key=int):
            site, header = self._queue.pop(ticket)

            def answer(site: str = site, header: dict[str, Any] = header) -> Reply:
                own, body = self.ask(site, header)
                return Reply("", json.loads(json.dumps(own)), body)

            found.append(replace(self.meddle(header["kind"], header, answer), ticket=ticket))
        return found

    def ask(self, site: str, header: Mapping[str, Any]) -> tuple[Mapping[str, Any], bytes]:
        """Ask a site as its worker does."""
        request = door.read_request(header)
        assert isinstance(
            request,
            door.SumKeys | door.SumShares | door.SumVector | door.SumSurvivors | door.SumEnd,
        )
        try:
            reply, body = self.sums[site].answer(request)
        except Refusal as refusal:
            return {"refused": str(refusal.code), "option": refusal.option, "site": site}, b""
        if body:
            self.sent.append((site, request.nonce, body))
        return reply, body

    def sum(self, sites: Collection[str] = (), *, number: int = 1, **task: Any) -> Summed:
        """Try one sum."""
        own = SumTask(
            "run", "recipe", number, TREE, tree_digest="tree", cohort_size=len(self.names)
        )
        patience = Patience(probe_seconds=5.0, poll_seconds=0.001, attempts=2, sum_seconds=10.0)
        secrecy = Secrecy(self.least, 16.0, 4.0, self.num_neighbors)
        who = sorted(sites or self.names)
        return SecretTry(self, self.intake, patience, secrecy, replace(own, **task), who).run()

    def refusals(self) -> list[str]:
        """Return what the coordinator's audit says of refused answers."""
        lines = (self.folder / "audit.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [f"{one['site']}: {one['reason']}" for one in found if one["event"] == "refused"]


def mean_of(names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the plain mean of sites' updates."""
    deltas = [update_of(name).delta for name in names]
    return {key: torch.stack([delta[key] for delta in deltas]).mean(0) for key in SHAPES}
