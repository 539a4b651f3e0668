from __future__ import annotations

import socket as socketlib
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchard.communication.refusals import Code
from orchard.engine.worker import WorkerError, _send, ask, serve


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="orchard-test-") as folder:
        yield Path(folder) / "own" / "worker"


def start(socket: Path, handle: Any) -> threading.Event:
    end = threading.Event()
    threading.Thread(target=serve, args=(socket, handle), kwargs={"until": end.is_set}).start()
    return end


def double(header: Mapping[str, Any], body: bytes) -> tuple[Mapping[str, Any], bytes]:
    if header.get("fails"):
        error = ValueError("too much")
        error.add_note("in round 1, client a, local training")
        raise error
    return {"n": header["n"] * 2}, body * 2


def test_a_request_is_answered_whatever_its_size(socket: Path) -> None:
    end = start(socket, double)
    try:
        for size in (0, 1, 3_000_000):
            header, body = ask(socket, {"n": 2}, bytes(size), seconds=10.0)
            assert header == {"n": 4}
            assert body == bytes(2 * size)
    finally:
        end.set()


def test_a_worker_that_answers_before_all_is_said_has_answered() -> None:
    ours, theirs = socketlib.socketpair()
    with ours:
        theirs.sendall(b"an answer")
        theirs.shutdown(socketlib.SHUT_WR)
        sent = []

        class Closing:
            def sendall(self, content: bytes) -> None:
                ours.sendall(content)
                sent.append(content)
                theirs.close()  # it has what it was promised

        _send(Closing(), {"n": 2}, b"")  # type: ignore[arg-type]
        assert len(sent) == 1
        assert ours.recv(100) == b"an answer"


def test_of_an_error_a_code_leaves_and_the_worker_goes_on(
    socket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    end = start(socket, double)
    try:
        with pytest.raises(WorkerError, match=r"^failed$") as caught:
            ask(socket, {"fails": True}, b"", seconds=10.0)
        assert caught.value.code is Code.FAILED
        assert "too much" in caplog.text  # for the owner
        assert "local training" in caplog.text
        assert ask(socket, {"n": 1}, b"", seconds=10.0)[0] == {"n": 2}
    finally:
        end.set()


def test_only_this_user_can_open_the_socket(socket: Path) -> None:
    end = start(socket, double)
    try:
        ask(socket, {"n": 1}, b"", seconds=10.0)
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    finally:
        end.set()


def test_whoever_asks_waits_for_a_worker_that_starts_late(socket: Path) -> None:
    def later() -> None:
        time.sleep(0.5)
        ends.append(start(socket, double))

    ends: list[threading.Event] = []
    thread = threading.Thread(target=later)
    thread.start()
    try:
        assert ask(socket, {"n": 1}, b"", seconds=10.0)[0] == {"n": 2}
    finally:
        thread.join()
        ends[0].set()


def test_a_request_that_workers_die_of_is_given_up(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchard.engine.worker._RETRY_SECONDS", 0.001)
    given = []

    def answer(connection: Any, handle: Any) -> None:
        given.append(connection)
        raise ConnectionResetError

    monkeypatch.setattr("orchard.engine.worker._answer", answer)
    end = start(socket, double)
    try:
        with pytest.raises(WorkerError, match="in 10 tries"):
            ask(socket, {"n": 1}, b"", seconds=60.0)
    finally:
        end.set()
    assert len(given) == 10


def test_a_wait_is_bounded(socket: Path) -> None:
    with pytest.raises(WorkerError, match=r"within 0\.3 seconds"):
        ask(socket, {"n": 1}, b"", seconds=0.3)
