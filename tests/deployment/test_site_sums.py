"""Secure sums between sites, question by question: ends, hostile answers, hostile questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchard.communication.messages import Update
from orchard.engine.exchange import Reply
from orchard.engine.secret_rounds import Summed
from orchard.secure.fixed_point import FixedPoint
from secret_sites import SHAPES, STEPS, SecretSites, mean_of, update_of

NAMES = ["bay", "cape", "dune", "fen", "glen"]  # so that four of them are enough


@pytest.fixture
def sites(tmp_path: Path) -> SecretSites:
    return SecretSites(tmp_path, NAMES)


def is_mean_of(found: Summed, names: list[str]) -> bool:
    if found.total is None or sorted(found.members) != sorted(names):
        return False
    expected = mean_of(names)
    return all(
        torch.allclose(found.total.delta[key], tensor, rtol=0, atol=1e-6)
        for key, tensor in expected.items()
    )


def test_the_sum_is_the_mean_and_what_was_sent_tells_of_nobody(sites: SecretSites) -> None:
    found = sites.sum()
    assert is_mean_of(found, NAMES)
    assert not found.excluded | found.untrained | found.barred
    for site, _, body in sites.sent:
        own = update_of(site)
        plain = FixedPoint(SHAPES, 16.0, 4.0, len(NAMES)).encode(own.delta, own.weight)
        assert not (np.frombuffer(body, dtype="<u4") == plain).any()


@pytest.mark.parametrize("has_answered", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_site_that_ends_in_any_step_has_left_and_comes_back_with_new_masks(
    step: str, has_answered: bool, sites: SecretSites
) -> None:
    killed: list[str] = []

    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        if asked == step and header["site"] == "cape" and not killed:
            killed.append(header["nonce"])
            if has_answered:
                answer()
            sites.restart("cape")
            return Reply("", error="no_worker")
        return answer()

    sites.meddle = meddle
    found = sites.sum()
    # Asked again, it is not in this sum, but where nothing of it had left before.
    is_new = step == "sum_keys" and not has_answered
    is_in = is_new or step in ("sum_survivors", "sum_end")
    assert is_mean_of(found, NAMES if is_in else [name for name in NAMES if name != "cape"])
    if not is_new:
        assert any(r.startswith("cape: left a secure sum") for r in sites.refusals())
        # What was begun before is over, whoever asks.
        again = {"kind": "sum_keys", "run": "run", "round": 1, "nonce": killed[0], "site": "cape"}
        terms = {"num_members": 5, "threshold": 4, "max_weight": 4.0}
        assert sites.ask("cape", {**again, **terms})[0]["refused"] == "left_sum"
    check_masks(sites)


def check_masks(sites: SecretSites) -> None:
    """See that no mask was used twice: of one site, two vectors of one update differ as noise."""
    for site in NAMES:
        own = [(nonce, body) for name, nonce, body in sites.sent if name == site]
        assert len({nonce for nonce, _ in own}) == len(own)
        vectors = [np.frombuffer(body, dtype="<u4") for _, body in own]
        for first, second in pairwise(vectors):
            assert (first == second).mean() < 0.1


@pytest.mark.parametrize("step", STEPS)
def test_a_coordinator_that_ends_in_any_step_begins_anew_with_new_masks(
    step: str, sites: SecretSites
) -> None:
    class Killed(BaseException):
        pass

    asked_of: list[str] = []

    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        if asked == step:
            asked_of.append(header["site"])
            if len(asked_of) == 3:  # the site has answered, and nobody heard it
                raise Killed
        return reply

    sites.meddle = meddle
    with pytest.raises(Killed):
        sites.sum()
    sites._queue.clear()
    assert is_mean_of(sites.sum(), NAMES)
    check_masks(sites)
    assert len({nonce for _, nonce, _ in sites.sent}) == 1 + (STEPS.index(step) >= 2)


def test_who_told_its_shares_is_in_no_sum_of_others_in_that_round(sites: SecretSites) -> None:
    assert sites.sum().total is not None
    others = [name for name in NAMES if name != "fen"]
    found = sites.sum(others)
    assert found.total is None
    # Also after a restart: it stands on the disk.
    sites.restart("bay")
    sites.restart("cape")
    assert sites.sum(others).total is None
    assert is_mean_of(sites.sum(), NAMES)
    for name in NAMES:
        sites.train(name, number=2)
    assert sites.sum(others, number=2).total is not None
    assert sites.sum(number=1).total is None


def test_a_lost_reply_is_the_same_bytes_and_nothing_else_is_answered_twice(
    sites: SecretSites,
) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def meddle(step: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        first = answer()
        if header["site"] == "bay":
            asked[step] = header
            assert answer() == first
            if step in ("sum_survivors", "sum_end"):
                key = "survivors" if step == "sum_survivors" else "confirmed"
                fewer = dict(list(header[key].items())[:4])
                assert sites.ask("bay", {**header, key: fewer})[0]["refused"] == "secrecy"
            if step == "sum_vector":
                other = {**header, "sharing": header["sharing"][::-1]}
                assert sites.ask("bay", other)[0]["refused"] == "secrecy"
        return first

    sites.meddle = meddle
    assert is_mean_of(sites.sum(), NAMES)
    assert asked.keys() == {*STEPS}


HEX = "0" * 64


@pytest.mark.parametrize(
    ("step", "change"),
    [
        ("sum_keys", {"mask_key": HEX}),
        ("sum_keys", {"mask_key": "zz"}),
        ("sum_keys", {"site": "bay"}),
        ("sum_keys", {"signature": "00" * 500}),
        ("sum_keys", {"more": 1}),
        ("sum_shares", {"sealed": {}}),
        ("sum_shares", {"sealed": {"north": "00" * 160}}),
        ("sum_shares", {"digests": {}}),
        ("sum_shares", {"sealed": {name: "00" * 1600 for name in NAMES}}),
        ("sum_vector", {"unreadable": ["north"]}),
        ("sum_vector", {"unreadable": "bay"}),
        ("sum_vector", {"signature": ""}),
        ("sum_survivors", {"signature": 3}),
        ("sum_end", {"own_masks": {"bay": "00" * 66}}),
        ("sum_end", {"mask_keys": {"bay": "00" * 66}}),
        ("sum_end", {"own_masks": {"north": "00" * 66}}),
        ("sum_end", {"own_masks": 7}),
    ],
)
def test_an_answer_that_cannot_be_names_its_site_and_the_others_go_on(
    step: str, change: dict[str, Any], sites: SecretSites
) -> None:
    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        if asked == step and header["site"] == "cape":
            return replace(reply, header={**reply.header, **change})
        return reply

    sites.meddle = meddle
    found = sites.sum()
    assert found.total is not None
    assert found.excluded == {"cape"}
    assert [r for r in sites.refusals() if r.startswith("cape: ")]
    assert not [r for r in sites.refusals() if not r.startswith("cape: ")]


@pytest.mark.parametrize("body", [b"", bytes(3), bytes(4 * 24 + 4), bytes(1 << 20)])
def test_a_vector_of_another_length_is_not_decoded(body: bytes, sites: SecretSites) -> None:
    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        reply = answer()
        mine = asked == "sum_vector" and header["site"] == "cape"
        return replace(reply, body=body) if mine else reply

    sites.meddle = meddle
    found = sites.sum()
    assert is_mean_of(found, [name for name in NAMES if name != "cape"])
    assert any("masked vector must have 96 bytes" in reason for reason in sites.refusals())


def test_a_site_that_shares_another_secret_spoils_one_round_and_is_in_no_other(
    sites: SecretSites,
) -> None:
    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        if asked == "sum_shares" and header["site"] == "cape":
            sites.sums["cape"]._sums["run"].member._own_mask = bytes(32)
        return answer()

    sites.meddle = meddle
    found = sites.sum()
    assert (found.total, found.is_spoiled, found.barred) == (None, True, {"cape"})


def test_a_vector_of_nonsense_spoils_a_round_and_ends_no_run(sites: SecretSites) -> None:
    delta = {key: torch.full(shape, 16.0) for key, shape in SHAPES.items()}
    sites.train("cape", update=Update("cape", 1, delta, dict.fromkeys(delta, 1e-6)))

    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        if asked == "sum_vector" and header["site"] == "cape":
            vector = np.full(24, 2**30, dtype=np.uint32)
            vector[-2:] = 1  # whose weight is next to nothing
            sites.sums["cape"]._sums["run"].vector = vector
        return answer()

    sites.meddle = meddle
    for name in NAMES:
        if name != "cape":
            sites.train(name, update=Update(name, 1, {}, {}))
    found = sites.sum()
    assert (found.total, found.is_spoiled) == (None, True)
    assert not found.excluded | found.barred  # nobody can say whose it is


def with_terms(key: str, value: Any) -> Callable[..., Reply]:
    def change(sites: SecretSites, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        own, body = sites.ask(header["site"], {**header, key: value})
        return Reply("", json.loads(json.dumps(own)), body)

    return change


@pytest.mark.parametrize(
    ("key", "value"), [("max_weight", 5.0), ("num_members", 6), ("threshold", 5)]
)
def test_sites_that_are_told_different_terms_have_no_sum(
    key: str, value: Any, sites: SecretSites
) -> None:
    change = with_terms(key, value)

    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        if asked == "sum_keys" and header["site"] in ("cape", "fen"):
            return change(sites, header, answer)
        return answer()

    sites.meddle = meddle
    assert sites.sum().total is None
    assert not sites.sent


def test_sites_that_trained_from_different_trees_have_no_sum(sites: SecretSites) -> None:
    waiting = sites.sums["cape"]._waiting["run"]
    sites.sums["cape"].keep("run", replace(waiting, tree_digest="another"))
    assert sites.sum().total is None
    assert "cape" not in {site for site, _, _ in sites.sent}


def test_different_survivors_for_different_sites_are_refused(sites: SecretSites) -> None:
    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        if asked == "sum_survivors" and header["site"] in ("cape", "fen"):
            fewer = {n: s for n, s in header["survivors"].items() if n != "bay"}
            own, body = sites.ask(header["site"], {**header, "survivors": fewer})
            return Reply("", json.loads(json.dumps(own)), body)
        return answer()

    sites.meddle = meddle
    assert sites.sum().total is None
    told = [line for name in NAMES for line in steps_of(sites, name) if line == "sum_end"]
    assert not told


def steps_of(sites: SecretSites, name: str) -> list[str]:
    lines = (sites.folder / "stores" / name / "audit.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [one["step"] for one in found if one["event"] == "summed"]


def test_a_coordinator_cannot_pose_as_a_site(sites: SecretSites, tmp_path: Path) -> None:
    own = SecretSites(tmp_path / "other", NAMES)

    def meddle(asked: str, header: dict[str, Any], answer: Callable[[], Reply]) -> Reply:
        if asked == "sum_keys" and header["site"] != "bay":  # all but one are its own
            reply, body = own.ask(header["site"], header)
            return Reply("", json.loads(json.dumps(reply)), body)
        return answer()

    sites.meddle = meddle
    assert sites.sum().total is None
    assert steps_of(sites, "bay") == ["sum_keys"]


@pytest.mark.parametrize(("floor", "is_summed"), [(5, True), (6, False)])
def test_a_sites_own_floor_wins_over_the_recipes(
    floor: int, is_summed: bool, tmp_path: Path
) -> None:
    sites = SecretSites(tmp_path, NAMES, options={"secure_least": floor})
    assert (sites.sum().total is not None) == is_summed
    assert bool(sites.sent) == is_summed


def test_a_site_begins_so_many_sums_of_a_round(
    sites: SecretSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchard.deployment.site_sums.MAX_SUMS", 3)
    header = {"kind": "sum_keys", "run": "run", "round": 1, "site": "bay"}
    terms = {"num_members": 5, "threshold": 4, "max_weight": 4.0}
    said = [
        sites.ask("bay", {**header, **terms, "nonce": hashlib.sha256(bytes([i])).hexdigest()})[0]
        for i in range(4)
    ]
    assert ["refused" in own for own in said] == [False, False, False, True]


def test_a_value_beyond_the_bound_leaves_under_no_mask(sites: SecretSites) -> None:
    delta = {key: torch.full(shape, 17.0) for key, shape in SHAPES.items()}
    sites.train("cape", update=Update("cape", 1, delta, dict.fromkeys(delta, 1.0)))
    found = sites.sum()
    assert is_mean_of(found, [name for name in NAMES if name != "cape"])
    assert found.excluded == {"cape"}
    assert "cape" not in {site for site, _, _ in sites.sent}


def test_who_lost_its_update_is_asked_to_train_again(sites: SecretSites) -> None:
    sites.sums["cape"] = sites.start("cape")
    found = sites.sum()
    assert found.untrained == {"cape"}
    assert is_mean_of(found, [name for name in NAMES if name != "cape"])
