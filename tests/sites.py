"""Sites for tests: files of the four offices, and a post that hands requests to workers here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from federations import quick_recipe, short_model
from orchard.data import world
from orchard.deployment.consent import Consent, SiteSettings
from orchard.deployment.server_app import build_coordinator
from orchard.deployment.site_worker import SiteWorker
from orchard.engine.coordinator import Coordinator
from orchard.engine.exchange import Patience, Reply
from orchard.engine.progress import Silent
from orchard.experiment.methods import build_strategy
from orchard.experiment.running import load_model
from orchard.models.stored.loading import load_tokenizer
from orchard.recipe.options import Recipe
from orchard.server.checkpoint import ServerState, load_checkpoint
from orchard.strategies.strategy import Strategy, start_server

PATIENT = Patience(
    join_seconds=20.0, round_seconds=60.0, probe_seconds=0.2, quorum=2, poll_seconds=0.01
)


def write_sites(folder: Path, *, num_sites: int = 2) -> Path:
    """Write one file of examples for each of some offices, and return their folder."""
    folder.mkdir(parents=True)
    for office in world.offices(0)[:num_sites]:
        lines = [
            json.dumps({"instruction": e.instruction, "response": e.response, "category": "office"})
            for e in office.train[:24]
        ]
        (folder / f"{office.name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def site_recipe(method: str, data: Path, *overrides: str) -> Recipe:
    """Return a quick recipe whose clients are the files of ``data``."""
    budget = ("client.budget=50%, 100%",) if "hfedmoe" in method else ()
    recipe = quick_recipe(method, *budget, "client.steps=1", *overrides)
    own = replace(recipe.data, path=str(data), category="category", test_size=0.25)
    return replace(recipe, data=own)


def changed(whole: Recipe, key: str, value: Any) -> Recipe:
    """Return a recipe in which one option is another."""
    section, _, name = key.partition(".")
    return replace(whole, **{section: replace(getattr(whole, section), **{name: value})})


@dataclass
class LocalPost:
    """Hands requests to workers in this process, each when its reply is asked for.

    Attributes:
        workers: Site to its worker.
        meddle: Given site, header and what the worker would answer, returns what arrives; None
            where the request is lost.
        asked: Site and header of every request, in order.
        offline: Sites that cannot be asked.
    """

    workers: Mapping[str, SiteWorker]
    meddle: Callable[[str, Mapping[str, Any], Callable[[], Reply]], Reply | None] = (
        lambda site, header, answer: answer()
    )
    asked: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    offline: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._queue: dict[str, tuple[str, Mapping[str, Any], bytes]] = {}
        self._numbers = itertools.count()

    def online(self) -> frozenset[str]:
        return frozenset(self.workers) - self.offline

    def send(self, site: str, header: Mapping[str, Any], body: bytes) -> str:
        ticket = str(next(self._numbers))
        self._queue[ticket] = site, header, body
        self.asked.append((site, header))
        return ticket

    def collect(self, tickets: Collection[str]) -> list[Reply]:
        replies = []
        for ticket in sorted(set(tickets) & self._queue.keys(), key=int):
            site, header, body = self._queue[ticket]
            # A site handles one request after another.
            if any(
                own[0] == site for earlier, own in self._queue.items() if int(earlier) < int(ticket)
            ):
                continue

            def answer(
                site: str = site,
                header: Mapping[str, Any] = header,
                body: bytes = body,
                ticket: str = ticket,
            ) -> Reply:
                # As over a network: what JSON cannot hold does not arrive.
                own, content = self.workers[site].handle(json.loads(json.dumps(header)), body)
                own = json.loads(json.dumps(own))
                return Reply(ticket, own, content, error=own.get("error", ""))

            reply = self.meddle(site, header, answer)
            if reply is LATER:
                continue
            del self._queue[ticket]
            if reply is not None:
                replies.append(replace(reply, ticket=ticket))
        return replies


LATER = Reply("later")
"""What ``meddle`` returns where the answer is not there yet."""


def make_workers(
    data: Path, stores: Path, *, consent: Callable[[Consent], Consent] = lambda own: own
) -> dict[str, SiteWorker]:
    """Return one worker for each file of ``data``."""
    return {
        path.stem: SiteWorker(
            SiteSettings(
                path.stem,
                stores / path.stem,
                stores / path.stem / "socket",
                # Few rows, so that tests are short; what may leave is tested with enough of them.
                consent(Consent(str(path), model=short_model(), min_test=1, decimals=20)),
            )
        )
        for path in sorted(data.glob("*.jsonl"))
    }


def make_coordinator(
    recipe: Recipe, folder: Path, *, patience: Patience = PATIENT, num_sites: int = 2
) -> tuple[Coordinator, Callable[[int], tuple[Strategy, ServerState]]]:
    """Return a coordinator of ``recipe``, and what begins its run."""
    model = load_model(recipe, load_tokenizer(recipe.model.path))
    coordinator = build_coordinator(
        recipe, folder, run="test", base_digest=model.base_digest, num_sites=num_sites
    )
    coordinator.patience, coordinator.reporter = patience, Silent()

    def begin(num_clients: int) -> tuple[Strategy, ServerState]:
        strategy = build_strategy(recipe, num_clients=num_clients)
        return strategy, start_server(strategy, model.fresh)

    return coordinator, begin


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Say whether two trees are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def shared_tensors(run: Path) -> Mapping[str, torch.Tensor]:
    """Return the global tree of a run's last checkpoint."""
    state = load_checkpoint(run / "checkpoints", about={})
    assert state is not None
    return state.shared
