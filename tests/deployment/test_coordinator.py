"""The coordinator's rounds, with workers in this process in the place of sites."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from safetensors.torch import load_file

from federations import run_quickly
from orchard.communication.audit import read_audit
from orchard.engine.exchange import Reply
from orchard.results import MetricsLog
from orchard.server.checkpoint import ServerState, load_checkpoint
from own_module import PULLED, written
from sites import (
    LATER,
    PATIENT,
    LocalPost,
    make_coordinator,
    make_workers,
    same,
    site_recipe,
    write_sites,
)


def long(value: object) -> ParameterSet:
    return pytest.param(value, marks=pytest.mark.long)


METHODS = [long("fedavg"), long("flex"), long("hfedmoe"), "flex+hfedmoe", long("scaffold")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sites(tmp_path / "data")


def simulated(folder: Path) -> Mapping[str, torch.Tensor]:
    state = load_checkpoint(folder / "checkpoints", about={})
    assert state is not None
    return state.shared


def run(
    data: Path, folder: Path, *overrides: str, method: str = "flex", post: LocalPost | None = None
) -> ServerState:
    coordinator, begin = make_coordinator(site_recipe(method, data, *overrides), folder / "run")
    post = post or LocalPost(make_workers(data, folder / "sites"))
    return coordinator.run_rounds(post, begin, num_sites=2)


@pytest.mark.parametrize("method", METHODS)
def test_sites_end_with_the_simulators_tensors(method: str, data: Path, tmp_path: Path) -> None:
    options = ("evaluation.models=base,global,personal", "evaluation.every=1")
    run_quickly(tmp_path / "simulated", site_recipe(method, data, *options))
    state = run(data, tmp_path, *options, method=method)
    assert same(state.shared, simulated(tmp_path / "simulated"))
    for kept in sorted((tmp_path / "simulated" / "clients").glob("*/*.safetensors")):
        here = tmp_path / "sites" / kept.parent.name / "personal" / "test" / kept.parent.name
        assert same(load_file(kept), load_file(here / kept.name))
    measured = [evaluations(tmp_path / folder) for folder in ("simulated", "run")]
    assert measured[0] == measured[1]
    assert measured[0].keys() == {0, 1, 2}
    # A checkpoint may leave the server; who took part does not go with it.
    for path in (tmp_path / "run" / "checkpoints").rglob("*.*"):
        assert not [name for name in ("harbor", "hill") if name.encode() in path.read_bytes()]


def test_sites_run_an_own_method_with_the_simulators_tensors(data: Path, tmp_path: Path) -> None:
    name, options = "fedavg+mine:pulled", ("server.rounds=1", "strategy.prox_mu=5.0")
    with written(tmp_path / "own", mine=PULLED):
        recipe = site_recipe(name, data, *options)
        run_quickly(tmp_path / "simulated", recipe)
        allow = partial(replace, methods=("fedavg", "mine:pulled"))
        workers = make_workers(data, tmp_path / "sites", consent=allow)
        state = run(data, tmp_path, *options, method=name, post=LocalPost(workers))
    assert same(state.shared, simulated(tmp_path / "simulated"))


def evaluations(folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    found: dict[int, dict[str, dict[str, float]]] = {}
    for line in MetricsLog(folder / "metrics.jsonl").read():
        if line["kind"] == "evaluation":
            found.setdefault(line["round"], {}).update(line["clients"])
    return found


class Stopped(Exception):
    """In the place of a SIGKILL."""


# Requests: two to join, and in each round two to evaluate and train, then the last evaluation.
@pytest.mark.parametrize("stop_at", [*map(long, (2, 3, 4, 5, 6)), 7])
def test_a_coordinator_stopped_anywhere_goes_on(stop_at: int, data: Path, tmp_path: Path) -> None:
    options = ("evaluation.models=global", "evaluation.every=1")
    whole = run(data, tmp_path / "whole", *options)
    counter = itertools.count(1)

    def stop(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply:
        if next(counter) == stop_at:
            raise Stopped
        return answer()

    workers = make_workers(data, tmp_path / "sites")
    with pytest.raises(Stopped):
        run(data, tmp_path, *options, post=LocalPost(workers, stop))
    # New workers too: what a site needs is on its disk.
    again = LocalPost(make_workers(data, tmp_path / "sites"))
    assert same(run(data, tmp_path, *options, post=again).shared, whole.shared)
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole" / "run")


def test_an_update_that_came_before_a_crash_is_not_asked_again(data: Path, tmp_path: Path) -> None:
    def stop(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply:
        if site != second or header["kind"] != "round":
            return answer()
        looks.append(site)
        if len(looks) > 2:  # by then the first one's update is in
            raise Stopped
        return LATER

    looks: list[str] = []
    first, second = sorted(path.stem for path in data.glob("*.jsonl"))
    with pytest.raises(Stopped):
        run(data, tmp_path, post=LocalPost(make_workers(data, tmp_path / "sites"), stop))
    post = LocalPost(make_workers(data, tmp_path / "sites"))
    run(data, tmp_path, post=post)
    rounds = [(site, header["round"]) for site, header in post.asked if header["kind"] == "round"]
    assert rounds == [(second, 1), (first, 2), (second, 2)]


def once(action: Callable[[Callable[[], Reply]], Reply | None]) -> Any:
    """Meddle with the first request of a round, and with no other."""
    seen: list[str] = []

    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply | None:
        if header["kind"] == "round" and not seen:
            seen.append(site)
            return action(answer)
        return answer()

    return meddle


@pytest.mark.parametrize(
    "action",
    [
        long(lambda answer: None),
        lambda answer: (answer(), None)[1],
        long(lambda answer: Reply("", error="Flower error 5: gone", is_lost=True)),
        lambda answer: Reply("", error="out of memory"),
    ],
    ids=["request lost", "reply lost", "node gone", "failed once"],
)
def test_what_goes_wrong_once_changes_no_tensor(
    action: Callable[[Callable[[], Reply]], Reply | None], data: Path, tmp_path: Path
) -> None:
    whole = run(data, tmp_path / "whole")
    post = LocalPost(make_workers(data, tmp_path / "sites"), once(action))
    assert same(run(data, tmp_path, post=post).shared, whole.shared)


def test_what_the_last_round_made_is_evaluated_as_of_the_round_after(
    data: Path, tmp_path: Path
) -> None:
    asked = []

    def note(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply | None:
        if header["kind"] == "round":
            asked.append((header["round"], header["train"]))
        return answer()

    post = LocalPost(make_workers(data, tmp_path / "sites"), note)
    run(data, tmp_path / "run", "evaluation.models=personal", "evaluation.metrics=loss", post=post)
    # Two sites each: what they keep of round 2 is from before round 3.
    assert sorted(asked) == [*[(1, True)] * 2, *[(2, True)] * 2, *[(3, False)] * 2]


def only(site_number: int, reply: Reply | None, *, rounds: tuple[int, ...] = (1, 2)) -> Any:
    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply | None:
        is_meant = header["kind"] == "round" and header["index"] == site_number
        return reply if is_meant and header["round"] in rounds else answer()

    return meddle


def test_a_site_that_always_fails_is_left_out_where_the_quorum_allows(
    data: Path, tmp_path: Path
) -> None:
    post = LocalPost(make_workers(data, tmp_path / "sites"), only(0, Reply("", error="broken")))
    coordinator, begin = make_coordinator(
        site_recipe("fedavg", data), tmp_path / "run", patience=replace(PATIENT, quorum=1)
    )
    assert coordinator.run_rounds(post, begin, num_sites=2).round_number == 2
    lines = [x for x in MetricsLog(tmp_path / "run" / "metrics.jsonl").read()]
    assert [line["round/num_clients"] for line in lines if line["kind"] == "round"] == [1, 1]
    refused = [e for e in read_audit(tmp_path / "run" / "audit.jsonl") if e["event"] == "refused"]
    assert {(event["round"], event["reason"]) for event in refused} == {
        (1, "broken"),
        (2, "broken"),
    }


def test_no_round_counts_below_the_quorum(data: Path, tmp_path: Path) -> None:
    post = LocalPost(make_workers(data, tmp_path / "sites"), only(0, Reply("", error="broken")))
    coordinator, begin = make_coordinator(
        site_recipe("fedavg", data), tmp_path / "run", patience=replace(PATIENT, attempts=1)
    )
    with pytest.raises(TimeoutError, match="round 1 must have at least 2 updates, got 1"):
        coordinator.run_rounds(post, begin, num_sites=2)
    assert load_checkpoint(tmp_path / "run" / "checkpoints", about={}) is None


@pytest.mark.parametrize("accept_late", [False, True])
def test_a_straggler_is_dropped_or_counts_less(
    accept_late: bool, data: Path, tmp_path: Path
) -> None:
    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply | None:
        is_slow = header.get("round") == 1 and header.get("index") == 0
        is_over = any(line["kind"] == "round" for line in log.read())
        if header.get("round") == 2 and header.get("index") == 0:
            return Reply("", error="broken")
        return LATER if is_slow and not is_over else answer()

    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")

    patience = replace(
        PATIENT, quorum=1, round_seconds=0.1, probe_seconds=9.0, accept_late=accept_late
    )
    post = LocalPost(make_workers(data, tmp_path / "sites"), meddle)
    coordinator, begin = make_coordinator(
        site_recipe("fedavg", data), tmp_path / "run", patience=patience
    )
    # Time stands still while a worker works here, so only the slow one misses the deadline.
    coordinator.run_rounds(post, begin, num_sites=2)
    lines = [line for line in log.read() if line["kind"] == "round"]
    assert [line["round/num_clients"] for line in lines] == [1, 2 if accept_late else 1]
    late = [
        event
        for event in read_audit(tmp_path / "run" / "audit.jsonl")
        if event.get("round") == 1 and event["event"] in ("received", "refused")
    ]
    assert [event["event"] for event in late] == ["received"] + (
        ["refused", "received"] if accept_late else ["refused", "refused"]
    )


def test_too_few_sites_end_the_wait_with_the_reasons(data: Path, tmp_path: Path) -> None:
    workers = make_workers(
        data, tmp_path / "sites", consent=lambda own: replace(own, methods=("fedavg",))
    )
    coordinator, begin = make_coordinator(
        site_recipe("flex", data), tmp_path / "run", patience=replace(PATIENT, join_seconds=0.5)
    )
    with pytest.raises(TimeoutError, match=r"got 0 of 2 .*harbor: .*method"):
        coordinator.run_rounds(LocalPost(workers), begin, num_sites=2)


def test_a_site_with_another_base_is_refused(data: Path, tmp_path: Path) -> None:
    def lie(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        own = {**reply.header, "base_digest": "f" * 64} if header.get("index") == 0 else {}
        return replace(reply, header=own or reply.header)

    coordinator, begin = make_coordinator(
        site_recipe("fedavg", data), tmp_path / "run", patience=replace(PATIENT, quorum=1)
    )
    post = LocalPost(make_workers(data, tmp_path / "sites"), lie)
    coordinator.run_rounds(post, begin, num_sites=2)
    refused = [e for e in read_audit(tmp_path / "run" / "audit.jsonl") if e["event"] == "refused"]
    assert all("base model must be" in event["reason"] for event in refused)
    assert len(refused) == 2
