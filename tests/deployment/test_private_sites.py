"""Sites that train with noise: the simulator's tensors, and a count that no request gets around."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from federations import run_quickly
from orchard.communication.audit import AUDIT_FILE, read_audit
from orchard.communication.messages import decode_update, encode_task
from orchard.deployment import site_worker
from orchard.deployment.privacy_ledger import LEDGER_FILE
from orchard.deployment.server_app import countable
from orchard.deployment.site_worker import SiteWorker
from orchard.experiment.running import build_schedule, load_model
from orchard.models.stored.loading import load_tokenizer
from orchard.recipe.options import Recipe
from orchard.recipe.reading import to_toml
from orchard.server.accounting import spent
from sites import (
    PATIENT,
    LocalPost,
    changed,
    make_coordinator,
    make_workers,
    same,
    shared_tensors,
    site_recipe,
    write_sites,
)

PRIVATE = (
    *("privacy.unit=example", "privacy.delta=1e-3", "privacy.epsilon=8", "client.steps=2"),
    *("client.batch_size=4", "server.rounds=2"),
)
ROWS, RATE, STEPS = 18, 4 / 18, 2  # of a site: rows to train on, a step's share of them, a round's


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sites(tmp_path_factory.mktemp("private") / "data")
    # Two sites of different size, so that they need different noise.
    second = sorted(folder.glob("*.jsonl"))[1]
    second.write_text("\n".join(second.read_text().splitlines()[:12]) + "\n")
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "options"), [("fedavg", ()), ("flex", ("strategy.graft_choice=random",))]
)
def test_sites_end_with_the_simulators_tensors(
    method: str, options: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    recipe = site_recipe(method, data, *PRIVATE, *options, "privacy.random=seed")
    simulated = run_quickly(tmp_path / "simulated", recipe)
    noises = simulated["privacy"]["noise_per_client"]
    assert len(set(noises.values())) == 2
    costs = simulated["privacy"]["epsilon_per_client"]
    assert all(7.5 < epsilon <= 8 for epsilon in costs.values()), costs  # nobody has too much noise
    coordinator, begin = make_coordinator(recipe, tmp_path / "run", patience=PATIENT)
    workers = make_workers(data, tmp_path / "sites")
    state = coordinator.run_rounds(LocalPost(workers), begin, num_sites=2)
    assert same(state.shared, shared_tensors(tmp_path / "simulated"))
    for name in workers:
        ledger = json.loads((tmp_path / "sites" / name / LEDGER_FILE).read_text())
        (kind,) = ledger["trained"]
        assert (kind["noise"], kind["steps"]) == (noises[name], 4)


def make_worker(data: Path, store: Path, **consent: Any) -> SiteWorker:
    """Return the worker of the first site."""
    return next(
        iter(make_workers(data, store, consent=lambda own: replace(own, **consent)).values())
    )


def counted(*options: str) -> Recipe:
    return site_recipe("fedavg", Path("elsewhere"), *PRIVATE, *options)


def ask(
    worker: SiteWorker, recipe: Recipe, run: str = "r", round_number: int = 1
) -> dict[str, Any]:
    """Join, train a round, and return what is answered."""
    header = {"run": run, "recipe": to_toml(recipe)}
    reply, _ = worker.handle({"kind": "join", **header}, b"")
    if "refused" in reply:
        return dict(reply)
    fresh = load_model(recipe, load_tokenizer(recipe.model.path)).fresh
    task = encode_task(build_schedule(recipe).task(round_number, fresh))
    asked = {"kind": "round", "site": worker._settings.name, "index": 0, "num_clients": 1}
    asked |= {"round": round_number, "evaluate": [], "train": True}
    reply, body = worker.handle({**header, **asked}, task)
    return {**reply, "body": body}


def trained(worker: SiteWorker) -> int:
    """Return how many noisy steps the site has counted."""
    path = worker._settings.store / LEDGER_FILE
    return sum(kind["steps"] for kind in json.loads(path.read_text())["trained"])


def test_a_training_is_paid_for_before_it_begins(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, recipe = make_worker(data, tmp_path), counted()
    assert ask(worker, recipe)["body"]
    assert trained(worker) == STEPS

    def end(*others: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(site_worker, "train_client", end)
        assert ask(worker, recipe)["error"] == "no_memory"
    assert trained(worker) == 2 * STEPS
    assert ask(make_worker(data, tmp_path), recipe)["body"]  # as after a restart
    ledger = json.loads((worker._settings.store / LEDGER_FILE).read_text())
    (kind,) = ledger["trained"]
    assert (kind["steps"], kind["sampling_rate"]) == (3 * STEPS, RATE)
    assert ledger["epsilon"] == spent(
        noise=kind["noise"], sampling_rate=RATE, rounds=3 * STEPS, delta=1e-5
    )
    events = read_audit(tmp_path / worker._settings.name / AUDIT_FILE)
    epsilons = [own["epsilon"] for own in events if own["event"] == "paid"]
    assert len(epsilons) == 3
    assert epsilons == sorted(set(epsilons))
    assert epsilons[-1] == ledger["epsilon"]


def test_no_request_spends_more_than_the_owner_gives(data: Path, tmp_path: Path) -> None:
    recipe = counted()
    store = tmp_path / "store"
    once = trial(data, tmp_path / "trial", recipe)
    worker = make_worker(data, store, epsilon=1.05 * once, delta=1e-5)
    for round_number in (1, 2):
        assert ask(worker, recipe, round_number=round_number)["body"]
    spent_by_both = (worker._settings.store / LEDGER_FILE).read_bytes()
    refused = {"refused": "privacy", "option": "--epsilon", "site": worker._settings.name}
    # The same round again, another run, and one whose noise nearly nothing is.
    assert ask(worker, recipe, round_number=2) == {**refused, "body": b""}
    assert ask(worker, recipe, run="another") == refused
    assert ask(worker, counted("privacy.epsilon=1e6"), run="loud") == refused
    assert (worker._settings.store / LEDGER_FILE).read_bytes() == spent_by_both


def trial(data: Path, store: Path, recipe: Recipe) -> float:
    """Return what a whole run costs a site, at the owner's delta."""
    worker = make_worker(data, store)
    for round_number in (1, 2):
        ask(worker, recipe, round_number=round_number)
    return float(json.loads((worker._settings.store / LEDGER_FILE).read_text())["epsilon"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("privacy.unit", ""),
        ("privacy.random", "seed"),
        ("evaluation.models", "global"),
    ],
)
def test_nothing_leaves_beside_what_is_counted(
    option: str, value: str, data: Path, tmp_path: Path
) -> None:
    recipe = changed(counted(), option, value)
    worker = make_worker(data, tmp_path, epsilon=100.0)
    name = worker._settings.name
    assert ask(worker, recipe) == {"refused": "privacy", "option": option, "site": name}
    assert "body" in ask(make_worker(data, tmp_path / "other"), recipe)  # without the owner's word


def test_what_was_measured_in_training_stays(data: Path, tmp_path: Path) -> None:
    recipe = counted()
    told = []
    for epsilon in (0.0, 100.0):
        worker = make_worker(data, tmp_path / f"{epsilon}", epsilon=epsilon)
        told.append(decode_update(ask(worker, recipe)["body"]).metrics)
    gone = {"client/train_loss", "client/num_tokens"}
    assert gone <= told[0].keys()
    assert not gone & told[1].keys()
    assert told[1]["client/num_examples"] == ROWS


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b'{"trained": [1]}', b'{"trained": [{"noise": 1}]}']
)
def test_a_damaged_count_does_not_begin_anew(damage: bytes, data: Path, tmp_path: Path) -> None:
    worker, recipe = make_worker(data, tmp_path), counted()
    worker._settings.store.mkdir(parents=True)
    path = worker._settings.store / LEDGER_FILE
    path.write_bytes(damage)
    assert ask(worker, recipe)["refused"] == "privacy"
    assert path.read_bytes() == damage


def test_what_a_site_tells_of_its_rows_costs_nobody_the_result() -> None:
    told = {"honest": ROWS, "silent": None, "none": 0, "one": 1}
    recipe = changed(changed(counted(), "privacy.epsilon", 0.001), "client.steps", 10_000)
    assert countable(recipe, {**told, "huge": 10**12}) == {"huge": 10**12}
    assert countable(counted(), told) == {"honest": ROWS, "one": 1}
    assert countable(changed(counted(), "privacy.unit", ""), told) == {}
