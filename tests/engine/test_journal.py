"""Whose message ends the process is known after: real processes are killed while they are at it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchard.communication.channel import Channel
from orchard.communication.messages import Update
from orchard.engine.journal import MAX_DEATHS, Journal, num_ended, num_tried
from orchard.server.aggregation import mean
from orchard.server.checkpoint import load_checkpoint
from orchard.strategies.strategy import Strategy
from orchard.trees import Tree
from scripted import (
    FIRST,
    PATIENCE,
    SECOND,
    SHARED,
    Header,
    ScriptedPost,
    header_of,
    honest,
    raw_update,
    reasons,
    run,
    update_header,
)
from sites import same

DEADLY = 7.0
ALL_WANTED = replace(PATIENCE, wanted=3, attempts=2)


def die() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(asked: Header) -> tuple[Any, bytes]:
    tensors = {name: torch.full_like(tensor, DEADLY) for name, tensor in SHARED.items()}
    body = raw_update(update_header(asked), tensors) if asked["train"] else b""
    return header_of("bad", asked), body


def is_deadly(update: Update) -> bool:
    return float(update.delta[FIRST].max()) == DEADLY


@dataclass
class DyingChannel(Channel):
    """Ends the process that decodes the deadly update."""

    def unpack_update(self, message: bytes | bytearray, shared: Tree | None = None) -> Update:
        update = super().unpack_update(message, shared)
        return die() if is_deadly(update) else update


def dies_adding(updates: Iterable[Update], shared: Tree) -> Tree:
    return mean(die() if is_deadly(update) else update for update in updates)


def dies_together(updates: Iterable[Update], shared: Tree) -> Tree:
    held = list(updates)
    return die() if any(map(is_deadly, held)) else mean(held)


WAYS: dict[str, Callable[[], tuple[ScriptedPost, dict[str, Any]]]] = {
    "taken from the network": lambda: (ScriptedPost(lambda asked: die()), {}),
    "decoded": lambda: (ScriptedPost(deadly, channel=DyingChannel()), {}),
    "added": lambda: (ScriptedPost(deadly), {"strategy": Strategy(aggregate=dies_adding)}),
    "together": lambda: (ScriptedPost(deadly), {"strategy": Strategy(aggregate=dies_together)}),
}


def start(
    folder: Path, make: Callable[[], tuple[ScriptedPost, dict[str, Any]]], **facts: Any
) -> int:
    """Run a federation in a process of its own, and return how it ended."""

    def work() -> None:
        post, own = make()
        run(folder, post, patience=ALL_WANTED, **own, **facts)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


def num_ends(folder: Path, make: Any, **facts: Any) -> int:
    """Return how often the process was killed before the run came to its end."""
    for number in range(20):
        if start(folder, make, **facts) == 0:
            return number
    raise AssertionError("the run never came to its end")


def ends_in(folder: Path, context: AbstractContextManager[None]) -> None:
    """Leave behind what stands in the journal where the process ends in a context."""
    with context:
        left = (folder / "journal.now").read_bytes()
    (folder / "journal.now").write_bytes(left)


def shared_of(folder: Path) -> Tree:
    state = load_checkpoint(folder / "checkpoints", about={})
    assert state is not None
    return state.shared


@pytest.mark.parametrize("way", WAYS)
def test_an_update_that_ends_the_process_is_set_apart_after_three_ends(
    way: str, tmp_path: Path
) -> None:
    """The fault was a run that ended after five, and met the update again at every start."""
    folder, num_rounds = tmp_path / "run", 2
    ends = num_ends(folder, WAYS[way], num_rounds=num_rounds)
    assert ends == num_rounds * MAX_DEATHS == 6
    expected, _ = run(tmp_path / "without", ScriptedPost(None), num_rounds=num_rounds)
    assert same(shared_of(folder), expected.shared)
    said = sorted((folder / "quarantine").glob("*.json"))
    assert [json.loads(path.read_text())["site"] for path in said] == ["bad"] * num_rounds
    assert all("the process ended" in json.loads(path.read_text())["reason"] for path in said)
    assert all("the process ended" in reason for reason in reasons(folder))
    if way != "taken from the network":  # then there never was a message
        assert all(path.with_suffix("").stat().st_size > 0 for path in said)
    assert not [path for path in (folder / "inbox").rglob("*") if path.is_file()]
    assert Journal(folder).blamed() == []
    assert num_tried(folder) == 0


FULL = sum(tensor.numel() for tensor in SHARED.values())


def test_who_comes_last_is_not_blamed_for_the_memory_that_another_took(tmp_path: Path) -> None:
    """The honest site whose update came last was set apart for one that took most of the memory."""

    def dies(updates: Iterable[Update], shared: Tree) -> Tree:
        held: list[Update] = []
        for update in updates:  # each honest update has fewer values than the bad one
            held.append(update)
            taken = sum(tensor.numel() for own in held for tensor in own.delta.values())
            if taken > 2 * len(SHARED[SECOND]) + FULL - 1:
                die()
        return mean(held)

    def small(site: str, round_number: int) -> bytes:
        update = honest(site, round_number, shared={SECOND: SHARED[SECOND]})
        return Channel().pack_update(update)

    def heavy(asked: Header) -> tuple[Any, bytes]:
        tensors = {name: torch.full_like(tensor, 0.1) for name, tensor in SHARED.items()}
        weight = dict.fromkeys(SHARED, 1.0)  # it pulls least of all
        body = raw_update(update_header(asked, weight=weight), tensors)
        return header_of("bad", asked), body

    folder, sites = tmp_path / "run", ("a", "bad", "c")
    strategy = {"strategy": Strategy(aggregate=dies)}
    make = lambda: (ScriptedPost(heavy, sites=sites, message=small), strategy)  # noqa: E731
    assert num_ends(folder, make, num_rounds=1) == MAX_DEATHS
    said = sorted((folder / "quarantine").glob("*.json"))
    assert [json.loads(path.read_text())["site"] for path in said] == ["bad"]
    post = ScriptedPost(None, sites=sites, message=small)
    expected, _ = run(tmp_path / "without", post, num_rounds=1)
    assert same(shared_of(folder), expected.shared)


def test_where_one_was_found_none_of_the_others_is_left_out_too(tmp_path: Path) -> None:
    for _ in range(MAX_DEATHS):
        ends_in(tmp_path, Journal(tmp_path).combining(4))
    journal = Journal(tmp_path)
    assert journal.suspect(4, ["bad", "a"]) == "bad"
    with journal.combining(4, left_out="bad"):
        pass  # and the process lives
    assert journal.suspect(4, ["a", "b"]) == ""
    assert Journal(tmp_path).suspect(4, ["a", "b"]) == ""


def test_sites_that_take_turns_do_not_end_a_run(tmp_path: Path) -> None:
    """Two of them ended it at the fifth end, before either was met three times."""
    counted = []
    for site in ("bad", "worse") * MAX_DEATHS:
        counted.append(num_ended(tmp_path))
        ends_in(tmp_path, Journal(tmp_path).reading(site, 4))
    assert counted == [0, *range(2 * MAX_DEATHS - 1)]  # an end is counted by the next start
    assert [own.site for own in Journal(tmp_path).blamed()] == ["bad", "worse"]


@pytest.mark.parametrize("content", [bytes(4096), b'{"site": "a", "ro', b'{"other": 1}'])
def test_what_a_power_failure_left_of_it_stops_nobody(content: bytes, tmp_path: Path) -> None:
    """It is not flushed: a file system may bring back zeros, and every start failed on them."""
    ends_in(tmp_path, Journal(tmp_path).reading("a", 4))
    (tmp_path / "journal.now").write_bytes(content)
    assert Journal(tmp_path).blamed() == []
    assert num_ended(tmp_path) == 0


def test_where_nobody_can_be_blamed_one_after_another_is_left_out(tmp_path: Path) -> None:
    """The shortest update is the deadly one, and is tried last."""

    def short(asked: Header) -> tuple[Any, bytes]:
        tensors = {name: torch.full_like(tensor, 0.5) for name, tensor in SHARED.items()}
        return header_of("bad", asked), raw_update(update_header(asked), tensors)

    def dies(updates: Iterable[Update], shared: Tree) -> Tree:
        held = list(updates)
        found = any(float(update.delta[FIRST].max()) == 0.5 for update in held)
        return die() if found else mean(held)

    folder, strategy = tmp_path / "run", {"strategy": Strategy(aggregate=dies)}
    assert num_ends(folder, lambda: (ScriptedPost(short), strategy), num_rounds=1) == MAX_DEATHS + 2
    expected, _ = run(tmp_path / "without", ScriptedPost(None), num_rounds=1)
    assert same(shared_of(folder), expected.shared)
    assert len(reasons(folder)) == 1


def test_a_process_that_ends_whoever_is_left_out_says_so_and_begins_anew(tmp_path: Path) -> None:
    def dies(updates: Iterable[Update], shared: Tree) -> Tree:
        list(updates)
        return die()

    make = lambda: (ScriptedPost(deadly), {"strategy": Strategy(aggregate=dies)})  # noqa: E731
    folder = tmp_path / "run"
    for _ in range(MAX_DEATHS + 3):
        assert start(folder, make, num_rounds=1) == -signal.SIGKILL
    assert num_tried(folder) == 2  # the last end is counted by the next start
    post, own = make()
    with pytest.raises(RuntimeError, match="whichever was left out; look at this machine's memory"):
        run(folder, post, patience=ALL_WANTED, num_rounds=1, **own)
    assert num_tried(folder) == 0
    assert not (folder / "quarantine").exists()


def test_one_end_of_the_process_blames_nobody(tmp_path: Path) -> None:
    """Machines are switched off too: an honest update that was being read then counts."""
    folder = tmp_path / "run"

    def dying_at(number: int) -> Callable[[], tuple[ScriptedPost, dict[str, Any]]]:
        def aggregate(updates: Iterable[Update], shared: Tree) -> Tree:
            return mean(die() if i == number else own for i, own in enumerate(updates))

        return lambda: (ScriptedPost(deadly), {"strategy": Strategy(aggregate=aggregate)})

    for number in (0, 1, 2, 0, 1, 2):
        assert start(folder, dying_at(number), num_rounds=1) == -signal.SIGKILL
    assert start(folder, dying_at(9), num_rounds=1) == 0
    expected, _ = run(tmp_path / "undisturbed", ScriptedPost(deadly), num_rounds=1)
    assert same(shared_of(folder), expected.shared)
    assert not (folder / "quarantine").exists()


def test_a_site_whose_answer_to_joining_ends_the_process_is_not_asked_again(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    make = lambda: (ScriptedPost(None, joins=lambda asked: die()), {})  # noqa: E731
    for _ in range(MAX_DEATHS):
        assert start(folder, make, num_rounds=1) == -signal.SIGKILL
    post, _ = make()
    run(folder, post, patience=PATIENCE, num_rounds=1)
    assert not [asked for site, asked in post.asked if site == "bad"]
    assert len(reasons(folder)) == 1


def test_a_message_is_kept_for_the_owner_once_the_process_ended_in_it(tmp_path: Path) -> None:
    for number in range(1, MAX_DEATHS + 1):
        journal = Journal(tmp_path)
        assert journal.blamed() == []
        ends_in(tmp_path, journal.reading("bad", 4, message=b"deadly"))
        kept = list((tmp_path / "inbox").glob("unread/*"))
        assert [path.read_bytes() for path in kept] == [b"deadly"] * (number > 1)
    (blamed,) = Journal(tmp_path).blamed()
    assert (blamed.site, blamed.round_number, blamed.path) == ("bad", 4, kept[0])
    assert Journal(tmp_path).blamed() == []
