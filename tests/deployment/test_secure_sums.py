"""Rounds of secure sums between sites: the simulator's tensors, ends of both sides, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orchard.engine.rounds
from federations import quick_recipe, run_quickly
from orchard.communication import door
from orchard.communication.audit import read_audit
from orchard.communication.messages import Update, encode_update
from orchard.deployment.consent import Consent
from orchard.deployment.hosting import CoordinatorOptions, check_coordinator
from orchard.deployment.keys import make_coordinator_keys, make_site_keys
from orchard.deployment.site import SiteOptions, check_site
from orchard.deployment.site_worker import SiteWorker
from orchard.engine.exchange import Reply
from orchard.engine.secret_rounds import BARRED_FILE
from orchard.engine.secret_sum import SUM
from orchard.recipe.options import Recipe
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import update_server
from secret_sites import STEPS
from sites import (
    PATIENT,
    LocalPost,
    make_coordinator,
    make_workers,
    same,
    shared_tensors,
    site_recipe,
    write_sites,
)

SECURE = ("privacy.secure_aggregation=true", "server.rounds=1")
NUM_SITES = 3
BY_EXAMPLES = "selection.router=examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sites(tmp_path_factory.mktemp("secure") / "data", num_sites=NUM_SITES)


@pytest.fixture(scope="module")
def keys(data: Path) -> Path:
    return make_keys(data)


@pytest.fixture(scope="module")
def simulated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    run_quickly(folder, site_recipe("fedavg", data, *SECURE))
    return folder


def make_keys(data: Path) -> Path:
    folder = data.parent / "keys"
    for path in sorted(data.glob("*.jsonl")):
        make_site_keys(folder, path.stem)
    return folder / "sites"


def workers_of(data: Path, keys: Path, folder: Path, **others: Any) -> dict[str, SiteWorker]:
    def consent(own: Consent) -> Consent:
        key = str(keys / f"{Path(own.data).stem}.key")
        return replace(own, **{"peers": str(keys), "signing_key": key, **others})

    return make_workers(data, folder / "sites", consent=consent)


def run(recipe: Recipe, folder: Path, post: LocalPost, *, attempts: int = 3) -> ServerState:
    patience = replace(PATIENT, attempts=attempts, quorum=NUM_SITES)
    number = len(post.workers)
    coordinator, begin = make_coordinator(
        recipe, folder / "run", patience=patience, num_sites=number
    )
    return coordinator.run_rounds(post, begin, num_sites=number)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fedavg", ("server.rounds=2", "communication.dtype=bfloat16")),
        pytest.param(
            "flex+hfedmoe", (BY_EXAMPLES, "client.budget=50%,100%,50%"), marks=pytest.mark.long
        ),
        pytest.param("fedadam", ("server.weighting=uniform",), marks=pytest.mark.long),
        pytest.param("fedavg", ("privacy.secure_neighbors=2",), marks=pytest.mark.long),
    ],
)
def test_sites_end_with_the_simulators_tensors(
    method: str, options: tuple[str, ...], data: Path, keys: Path, tmp_path: Path
) -> None:
    recipe = site_recipe(method, data, *SECURE, *options)
    run_quickly(tmp_path / "simulated", recipe)
    state = run(recipe, tmp_path, LocalPost(workers_of(data, keys, tmp_path)))
    assert same(state.shared, shared_tensors(tmp_path / "simulated"))


def test_nothing_that_comes_to_the_coordinator_is_one_sites_update(
    data: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[tuple[str, Reply]] = []
    seen: list[str] = []

    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply:
        came.append((header["kind"], answer()))
        return came[-1][1]

    def watched(strategy: Any, state: Any, updates: Iterable[Update]) -> Any:
        own = list(updates)
        seen.extend(update.client_id for update in own)
        return update_server(strategy, state, own)

    monkeypatch.setattr(orchard.engine.rounds, "update_server", watched)
    recipe = site_recipe("fedavg", data, *SECURE)
    state = run(recipe, tmp_path, LocalPost(workers_of(data, keys, tmp_path), meddle))
    assert seen == [SUM]
    assert {kind for kind, _ in came} >= {"round", *STEPS}
    num_values = sum(tensor.numel() for tensor in state.shared.values())
    for kind, reply in came:
        if kind == "sum_vector":
            vector = np.frombuffer(reply.body, dtype="<u4")
            assert len(vector) == num_values + len(state.shared)
            # Most values of an update are tiny: unmasked, most of their upper bytes are 0 or 255.
            upper = vector >> 24
            assert ((upper == 0) | (upper == 255)).mean() < 0.05
        elif reply.body:
            assert door.read_layout(reply.body).keys() == {"__metadata__"}
        # In a header of an update's names and of values there would be far more.
        assert len(json.dumps(dict(reply.header))) < 4000
    # On its disk neither: what waits in the inbox is what was measured.
    for path in (tmp_path / "run").rglob("round_*"):
        assert path.is_dir() or path.stat().st_size < 4000


@pytest.mark.long
def test_a_coordinator_that_is_killed_in_each_step_ends_with_the_same_tensors(
    data: Path, keys: Path, simulated: Path, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    left, nonces = ["round", *STEPS], []
    trained: list[str] = []

    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        kind = header["kind"]
        trained.extend([site] if kind == "round" and header["train"] else [])
        nonces.extend([header["nonce"]] if kind == "sum_vector" else [])
        if left and kind == left[0] and site == "hill":
            left.pop(0)
            raise Killed
        return reply

    recipe, workers = site_recipe("fedavg", data, *SECURE), workers_of(data, keys, tmp_path)
    for _ in range(1 + len(STEPS)):
        with pytest.raises(Killed):
            run(recipe, tmp_path, LocalPost(workers, meddle))
    state = run(recipe, tmp_path, LocalPost(workers, meddle))
    assert not left
    assert same(state.shared, shared_tensors(simulated))
    # What was heard of them is on disk: after the first end nobody trains again, and each sum has
    # a nonce of its own.
    assert len(trained) <= 2 * NUM_SITES
    assert len({*nonces}) == 4


@pytest.mark.long
def test_a_site_that_is_killed_in_each_step_is_asked_again_with_new_masks(
    data: Path, keys: Path, simulated: Path, tmp_path: Path
) -> None:
    workers, left = workers_of(data, keys, tmp_path), list(STEPS)
    bodies: list[bytes] = []

    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply:
        if left and header["kind"] == left[0] and site == "hill":
            left.pop(0)
            answer()
            workers["hill"] = workers_of(data, keys, tmp_path)["hill"]
            return Reply("", error="no_worker")
        reply = answer()
        bodies.extend([reply.body] if header["kind"] == "sum_vector" and site == "hill" else [])
        return reply

    recipe = site_recipe("fedavg", data, *SECURE)
    state = run(recipe, tmp_path, LocalPost(workers, meddle), attempts=7)
    assert not left
    assert same(state.shared, shared_tensors(simulated))
    vectors = [np.frombuffer(body, dtype="<u4") for body in bodies if body]
    assert len(vectors) == 3
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert (vectors[first] == vectors[second]).mean() < 0.01


def test_who_spoils_a_sum_costs_a_round_and_is_in_no_later_one(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data", num_sites=4)
    workers = workers_of(data, make_keys(data), tmp_path)
    asked: list[tuple[int, str]] = []

    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply:
        if header["kind"] == "sum_shares":
            asked.append((header["round"], site))
            if site == "hill":
                workers[site]._sums._sums["test"].member._own_mask = bytes(32)
        return answer()

    recipe = site_recipe("fedavg", data, *SECURE, "server.rounds=2")
    run(recipe, tmp_path, LocalPost(workers, meddle))
    assert json.loads((tmp_path / "run" / BARRED_FILE).read_text()) == ["hill"]
    assert {site for number, site in asked if number == 1} == {*workers}
    assert {site for number, site in asked if number == 2} == {*workers} - {"hill"}
    sums = [e for e in read_audit(tmp_path / "run" / "audit.jsonl") if e["event"] == "secure_sum"]
    assert [(own["round"], own["sum"]) for own in sums] == [
        (1, "begun"),
        (1, "spoiled"),
        (2, "begun"),
        (2, "summed"),
    ]


def test_a_plain_update_is_refused_before_it_is_decoded(
    data: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = site_recipe("fedavg", data, *SECURE)
    coordinator, begin = make_coordinator(recipe, tmp_path / "run", num_sites=NUM_SITES)
    shared = begin(NUM_SITES)[1].shared
    message = encode_update(Update("hill", 1, shared, dict.fromkeys(shared, 1.0)))

    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        is_plain = header["kind"] == "round" and site == "hill"
        return replace(reply, body=message) if is_plain else reply

    def decoded(own: Any, *arguments: Any) -> Any:
        assert bytes(own) != message
        return read(own, *arguments)

    read = coordinator.channel.unpack_update
    monkeypatch.setattr(coordinator.channel, "unpack_update", decoded)
    coordinator.patience = replace(PATIENT, attempts=1, quorum=NUM_SITES)
    post = LocalPost(workers_of(data, keys, tmp_path), meddle)
    with pytest.raises(TimeoutError, match="round 1 must have at least 3 updates, got 2"):
        coordinator.run_rounds(post, begin, num_sites=NUM_SITES)
    refused = [e for e in read_audit(tmp_path / "run" / "audit.jsonl") if e["event"] == "refused"]
    assert refused[0]["site"] == "hill"
    assert "must hold no tensor where sums are secret" in refused[0]["reason"]


@pytest.mark.parametrize(
    ("own", "secure", "words"),
    [
        ({"secure_least": 3}, False, "privacy.secure_aggregation must be true"),
        ({"peers": ""}, True, "--keys and --peers must be given"),
        ({"signing_key": ""}, True, "--keys and --peers must be given"),
        ({"secure_least": 4}, True, "--peers must hold the keys of at least 3 other sites, got 2"),
    ],
)
def test_a_site_joins_no_run_that_its_owners_rule_forbids(
    own: dict[str, Any], secure: bool, words: str, data: Path, keys: Path, tmp_path: Path
) -> None:
    recipe = site_recipe("fedavg", data, *(SECURE if secure else ()))
    workers = workers_of(data, keys, tmp_path, **own)
    coordinator, begin = make_coordinator(
        recipe,
        tmp_path / "run",
        patience=replace(PATIENT, join_seconds=0.5),
        num_sites=NUM_SITES,
    )
    with pytest.raises(TimeoutError):
        coordinator.run_rounds(LocalPost(workers), begin, num_sites=NUM_SITES)
    refused = [e for e in read_audit(tmp_path / "run" / "audit.jsonl") if e["event"] == "refused"]
    assert "(secrecy)" in refused[0]["reason"]
    said = read_audit(tmp_path / "sites" / "hill" / "audit.jsonl")
    assert said[-1]["reason"].startswith(words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("server.aggregation=median",), "server.aggregation must be mean"),
        (("deployment.max_update_norm=3",), "deployment.max_update_norm must be 0.0"),
        (("deployment.stragglers=late",), "deployment.stragglers must be drop"),
        (("deployment.weights=equal",), "deployment.weights must be examples"),
        (("privacy.secure_least=4",), "server.clients_per_round must be at least"),
        (("privacy.secure_neighbors=3",), "privacy.secure_neighbors must be 0 or an even number"),
        (
            ("privacy.unit=client", "privacy.epsilon=8", "privacy.delta=1e-3"),
            "privacy.unit must not be client between sites",
        ),
    ],
)
def test_what_looks_at_single_updates_is_refused_between_sites(
    options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    own = CoordinatorOptions(tmp_path / "run", "127.0.0.1:1")
    recipe = quick_recipe("fedavg", "deployment.sites=3", *SECURE, *options)
    with pytest.raises(ValueError, match=f"^{words}"):
        check_coordinator(recipe, own, resume=False)


def test_a_site_that_wants_sums_needs_its_key_and_those_of_others(tmp_path: Path) -> None:
    data, keys, peers = tmp_path / "data.jsonl", tmp_path / "keys", tmp_path / "peers"
    data.touch()
    make_coordinator_keys(keys, ["127.0.0.1"], days=1)
    for name in ("north", "south"):
        make_site_keys(keys, name)
    peers.mkdir()
    key = str(keys / "sites" / "north.key")

    def check(keys_folder: Path | None = keys, **own: Any) -> None:
        consent = Consent(str(data), **own)
        check_site(SiteOptions("north", "127.0.0.1:1", tmp_path / "store", consent, keys_folder))

    with pytest.raises(ValueError, match=r"^--secure-least must be 0 or at least 2, got 1"):
        check(secure_least=1, peers=str(peers), signing_key=key)
    with pytest.raises(ValueError, match=r"^--peers must name the public keys of other sites"):
        check(secure_least=3)
    with pytest.raises(ValueError, match=r"^--keys must be given with --peers"):
        check(keys_folder=None, peers=str(peers))
    with pytest.raises(FileNotFoundError, match=r"^--peers must hold the public keys of other"):
        check(peers=str(peers), signing_key=key)
    south = (keys / "sites" / "south.pub").read_bytes()
    (peers / "south.pub").write_bytes(south)
    check(peers=str(peers), signing_key=key)
    with pytest.raises(ValueError, match="at least 2 other sites with --secure-least 3, got 1"):
        check(secure_least=3, peers=str(peers), signing_key=key)
    for name, content, words in (
        ("east", south, "must hold another key than east's, got the same"),
        ("east", b"ssh-rsa AAAA", "must hold a site's public key, got none"),
        ("north", south, "must be this site's own key, got another"),
        ("a b", south, "must be called as a site"),
    ):
        (peers / f"{name}.pub").write_bytes(content)
        with pytest.raises(ValueError, match=words):
            check(peers=str(peers), signing_key=key)
        (peers / f"{name}.pub").unlink()
