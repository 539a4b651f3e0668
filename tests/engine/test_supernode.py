"""Our SuperNode: what it pulls is handed to the worker, and what that answers goes back."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
    inflate_object_from_contents,
)
from flwr.supercore.task_identity import TaskIdentity

from orchard.engine.flower_messages import pack, unpack
from orchard.engine.supernode import read_keys, take_one
from orchard.engine.worker import serve


@pytest.fixture
def socket() -> Iterator[Path]:
    """Serve a worker that doubles what it is sent."""

    def double(header: Any, body: bytes) -> tuple[Any, bytes]:
        if header.get("fails"):
            raise ValueError("what is private")
        return {"n": 2 * header["n"]}, 2 * body

    with tempfile.TemporaryDirectory(prefix="orchard-test-") as folder:
        path, end = Path(folder) / "worker", threading.Event()
        thread = threading.Thread(target=serve, args=(path, double), kwargs={"until": end.is_set})
        thread.start()
        yield path
        end.set()
        thread.join()


class SuperLink:
    """Has one message for the node, and keeps what comes back."""

    def __init__(self, content: RecordDict) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # Only an app that Flower started has a run.
            patch.setattr(TaskIdentity, "_run_id", 5)
            patch.setattr(TaskIdentity, "_node_id", 1)
            patch.setattr(TaskIdentity, "_task_id", 1)
            message = Message(content, dst_node_id=7, message_type="query")
        message.metadata.__dict__["_message_id"] = message.object_id
        self.tree = get_object_tree(message)
        self.objects = {n: o.deflate() for n, o in get_all_nested_objects(message).items()}
        self.waiting: list[Any] = [(message, self.tree)]
        self.late = set(self.objects)  # each is asked for once before it is there
        self.confirmed: list[str] = []
        self.sent: dict[str, bytes] = {}
        self.reply = ""

    def connection(self) -> tuple[Any, ...]:
        return (7, self.receive, self.send, None, None, self.pull, self.push, self.confirm)

    def receive(self) -> Any:
        return self.waiting.pop() if self.waiting else None

    def pull(self, run_id: int, name: str) -> bytes:
        if name in self.late:
            self.late.remove(name)
            raise ObjectUnavailableError(name)
        return self.objects[name]

    def confirm(self, run_id: int, name: str) -> None:
        self.confirmed.append(name)

    def send(self, reply: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        self.reply = tree.object_id
        assert reply.metadata.reply_to_message_id == self.tree.object_id
        return set(get_all_nested_objects(reply)), "session"

    def push(self, run_id: int, session: str, name: str, content: bytes) -> None:
        assert (run_id, session) == (5, "session")
        self.sent[name] = content

    def answer(self) -> tuple[dict[str, Any], bytes]:
        found = inflate_object_from_contents(self.reply, dict(self.sent))
        assert isinstance(found, Message)
        return unpack(found.content)


@pytest.mark.parametrize("size", [0, 1000, 6_000_000])
def test_a_message_is_answered_by_the_worker_and_its_objects_may_come_late(
    size: int, socket: Path
) -> None:
    link = SuperLink(pack({"n": 4}, bytes(size)))
    assert take_one(link.connection(), socket, seconds=10.0)
    assert link.answer() == ({"n": 8}, bytes(2 * size))
    assert link.confirmed == [link.tree.object_id]
    assert not take_one(link.connection(), socket, seconds=10.0)


def test_what_fails_in_the_worker_goes_back_as_a_code_alone(socket: Path) -> None:
    link = SuperLink(pack({"n": 4, "fails": True}, b""))
    take_one(link.connection(), socket, seconds=10.0)
    header, body = link.answer()
    assert header.keys() == {"error"}
    assert "private" not in json.dumps(header)
    assert body == b""


def test_a_message_of_another_app_is_answered_with_a_code(socket: Path) -> None:
    link = SuperLink(RecordDict())
    take_one(link.connection(), socket, seconds=10.0)
    assert link.answer()[0].keys() == {"error"}


def test_no_app_that_a_coordinator_hands_out_is_fetched_or_run(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own SuperNode asks for the app of a message's run, and runs it."""
    asked: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **facts: asked.append(given))
    link = SuperLink(pack({"n": 4}, b""))
    number, receive, send, _, _, pull, push, confirm = link.connection()
    run_and_app = [lambda *given: asked.append(given)] * 2
    connection = (number, receive, send, *run_and_app, pull, push, confirm)
    assert take_one(connection, socket, seconds=10.0)
    assert link.answer() == ({"n": 8}, b"")
    assert asked == []


def test_what_does_not_inflate_is_dropped_and_the_node_lives(socket: Path) -> None:
    link = SuperLink(pack({"n": 4}, b"x"))
    link.objects = dict.fromkeys(link.objects, b"\xffno object")
    assert take_one(link.connection(), socket, seconds=10.0)
    assert not link.reply


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    def written(key: Any) -> Path:
        path = tmp_path / type(key).__name__
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        return path

    private, public = read_keys(written(ec.generate_private_key(ec.SECP384R1())))
    assert private.public_key() == public
    with pytest.raises(ValueError, match="must be a key on an elliptic curve"):
        read_keys(written(ed25519.Ed25519PrivateKey.generate()))


def test_a_message_of_more_than_a_site_reads_is_dropped(
    socket: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = SuperLink(pack({"n": 4}, bytes(6_000_000)))
    assert take_one(link.connection(), socket, seconds=10.0, limit=5_000_000)
    assert link.sent == {}
    assert "message must have at most 5000000 bytes, got more" in caplog.text
    assert not take_one(link.connection(), socket, seconds=10.0)
