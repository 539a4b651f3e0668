"""Workers beside a process: kept running, replaced, given up, and never left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from orchard.engine.beside import workers_beside

# A worker in few lines, which starts fast: it dies of what it is told to die of.
_WORKER = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from orchard.engine.worker import serve, watches_parent

def handle(header, body):
    if header["kind"] == "die" or not Path(header["mark"]).exists() and not mark(header["mark"]):
        os._exit(7)
    return {{"pid": os.getpid(), "own": os.environ["OWN"]}}, body * 2

def mark(path):
    Path(path).write_text("")  # the next one lives

serve(Path(sys.argv[1]), handle, until=watches_parent())
"""
COMMAND = [sys.executable, "-c", _WORKER.format(path=sys.path)]


def test_one_that_dies_of_a_request_is_replaced_and_asked_again(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with workers_beside(COMMAND, [{"OWN": "a"}, {"OWN": "b"}], logs=tmp_path / "logs") as places:
        reply, body = places[1].ask({"kind": "turn", "mark": str(mark)}, b"xy")
        assert (reply["own"], body, places[1].num_restarts) == ("b", b"xyxy", 1)
        pid = reply["pid"]
        assert psutil.pid_exists(pid)
        other, _ = places[0].ask({"kind": "turn", "mark": str(mark)}, b"")
        assert (other["own"], places[0].num_restarts) == ("a", 0)
    assert not psutil.pid_exists(pid)
    assert not psutil.pid_exists(other["pid"])


def test_one_that_dies_of_every_request_is_given_up_in_one_line(tmp_path: Path) -> None:
    said = (
        r"^worker 0 must live, got one .* by hill's turn 3 times; look at .*worker0\.log .* lower"
    )
    with (
        workers_beside(COMMAND, [{"OWN": ""}], logs=tmp_path) as (place,),
        pytest.raises(ChildProcessError, match=said),
    ):
        place.ask({"kind": "die", "client": "hill"}, b"")


def test_one_that_never_answers_because_it_cannot_start_is_given_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with (
        workers_beside(command, [{}], logs=tmp_path) as (place,),
        pytest.raises(ChildProcessError, match=r"^worker 0 must live, got one .* failed 3 times"),
    ):
        place.ask({"kind": "begin"}, b"")
