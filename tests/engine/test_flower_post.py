"""What arrives in Flower's records, from whoever it is."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")
from flwr.app import DEFAULT_TTL, Array, ArrayRecord, ConfigRecord, RecordDict

from orchard.communication.door import MAX_HEADER_BYTES
from orchard.communication.readable import MAX_TEXT
from orchard.engine import flower
from orchard.engine.exchange import Patience, Reply, Request, exchange
from orchard.engine.flower import FlowerPost
from orchard.engine.flower_messages import pack, unpack
from orchard.engine.journal import WatchedPost
from orchard.recipe.run_options import DeploymentOptions


@pytest.fixture(autouse=True)
def _outside_an_app(monkeypatch: pytest.MonkeyPatch) -> None:
    # Flower makes a message only in the process of an app.
    monkeypatch.setattr(flower, "Message", lambda *arguments: arguments)


def records(text: Any) -> RecordDict:
    return RecordDict({"header": ConfigRecord({"json": text})})


class Grid:
    """Hands over what a test puts in, as the reply to ``ticket``."""

    def __init__(self, content: Any = None, error: Any = None) -> None:
        self.broken: dict[str, Exception] = {}
        self.ready = {"ticket"}
        self.reply = SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id="ticket"),
            content=content,
            error=error,
            has_error=lambda: error is not None,
        )

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=7, name="", last_activated_at=0)]

    def push_messages(self, messages: Any) -> list[str]:
        return ["ticket" for _ in messages]

    def pull_messages(self, tickets: Any) -> list[Any]:
        for ticket in tickets:
            if ticket in self.broken:
                raise self.broken[ticket]
        return [self.reply for ticket in tickets if ticket in self.ready]


def collected(content: Any = None, error: Any = None) -> Reply:
    (reply,) = FlowerPost(Grid(content, error)).collect(["ticket"])  # type: ignore[arg-type]
    return reply


def test_a_reply_crosses_as_it_was_packed() -> None:
    header = {"site": "north", "base_digest": "b"}
    reply = collected(pack(header, b"body"))
    assert (reply.header, reply.body, reply.error) == (header, b"body", "")


OTHERS = {
    "deep": records("[" * 60_000),
    "deep objects": records('{"a":' * 12_000),
    "long": records('{"error": "' + "x" * MAX_HEADER_BYTES + '"}'),
    "a number": records(5),
    "a list": records("[1]"),
    "a key twice": records('{"site": "a", "site": "b"}'),
    "infinity": records('{"evaluation_seconds": Infinity}'),
    "no header": RecordDict(),
    "another app's arrays": RecordDict(
        {
            "header": ConfigRecord({"json": "{}"}),
            "body": ArrayRecord({"message": Array("uint8", (1,), "numpy.ndarray", b"x")}),
        }
    ),
    "an error that is none": records('{"error": {"a": 1}}'),
    "a long error": records(json.dumps({"error": "x\n" * 100_000})),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_reply_is_an_error_of_its_site(kind: str) -> None:
    reply = collected(OTHERS[kind])
    assert reply.error
    assert reply.error.isprintable()
    assert len(reply.error) <= MAX_TEXT


def test_what_flower_says_of_a_node_is_cut_too() -> None:
    reply = collected(error=SimpleNamespace(code=3, reason="\x1b[2J" * 10_000))
    assert reply.is_lost
    assert reply.error.isprintable()
    assert len(reply.error) <= MAX_TEXT


@pytest.mark.parametrize("name", ["", "a\nb", "../up", "x" * 65, 5, None, ["a"]])
def test_a_node_that_gives_itself_no_name_of_a_site_has_none(name: Any) -> None:
    post = FlowerPost(Grid(pack({"site": name}, b"")))  # type: ignore[arg-type]
    assert post.online() == frozenset()


def test_a_node_without_a_key_has_the_name_that_it_gives_itself() -> None:
    post = FlowerPost(Grid(pack({"site": "north"}, b"")))  # type: ignore[arg-type]
    post.online()
    assert post.online() == {"north"}


def test_a_node_with_a_key_has_the_name_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it would say of itself: it is not asked."""
    grid = Grid(pack({"site": "south"}, b""))
    node = SimpleNamespace(node_id=7, name="north", last_activated_at=0)
    monkeypatch.setattr(grid, "get_nodes", lambda: [node])
    monkeypatch.setattr(grid, "push_messages", lambda messages: 1 / 0)
    post = FlowerPost(grid)  # type: ignore[arg-type]
    assert post.online() == post.online() == {"north"}


def test_a_request_is_read_by_the_same_rules() -> None:
    with pytest.raises(ValueError, match="nested at most"):
        unpack(records("[" * 60_000))


def test_no_round_is_longer_than_flower_keeps_its_messages() -> None:
    longest = DeploymentOptions.__dataclass_fields__["round_seconds"].metadata["maximum"]
    assert longest <= DEFAULT_TTL


@pytest.mark.parametrize("error", [ValueError("x" * 10_000), KeyError("a"), RecursionError()])
def test_a_message_that_flower_cannot_unpack_takes_no_other_with_it(error: Exception) -> None:
    grid = Grid(pack({"site": "north"}, b""))
    grid.broken["other"] = error
    replies = {reply.ticket: reply for reply in FlowerPost(grid).collect(["other", "ticket"])}  # type: ignore[arg-type]
    assert replies["ticket"].header == {"site": "north"}
    assert "does not unpack" in replies["other"].error
    assert len(replies["other"].error) <= MAX_TEXT


def test_a_superlink_that_is_gone_is_nobodys_answer() -> None:
    grid = Grid()
    grid.broken["ticket"] = ConnectionRefusedError()
    with pytest.raises(ConnectionRefusedError):
        FlowerPost(grid).collect(["ticket"])  # type: ignore[arg-type]


def test_an_answer_that_comes_while_its_probe_is_looked_at_is_not_missed() -> None:
    class Late(Grid):
        def pull_messages(self, tickets: Any) -> list[Any]:
            found = super().pull_messages(tickets)
            self.ready |= {"ticket", "probe"}  # both come after the first look
            return found

    grid = Late(pack({"site": "north"}, b""))
    grid.ready = set()
    post = WatchedPost(FlowerPost(grid), reading=lambda site, number: nullcontext())  # type: ignore[arg-type]
    found = post.collect(["ticket", "probe"])
    assert {reply.ticket for reply in found} == {"ticket", "probe"}


def test_large_answers_are_brought_a_part_at_a_time_and_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchard.engine.journal._MUCH_BYTES", 100)
    waiting = {f"ticket {number}": 60 for number in range(7)}

    class Large:
        def collect(self, tickets: Any) -> list[Reply]:
            return [Reply(t, {}, bytes(waiting.pop(t))) for t in tickets if t in waiting]

    post = WatchedPost(Large(), reading=lambda site, number: nullcontext())  # type: ignore[arg-type]
    tickets, sizes = list(waiting), []
    while found := post.collect(tickets):
        sizes.append(len(found))
    assert sizes == [2, 2, 2, 1]
    assert not waiting


def test_an_exchange_does_not_wait_between_parts_and_keeps_no_answer() -> None:
    asked: dict[str, str] = {}
    slept: list[float] = []

    class OneAtATime:
        def online(self) -> frozenset[str]:
            return frozenset(("a", "b", "c"))

        def send(self, site: str, header: Any, body: bytes) -> str:
            asked[site] = f"ticket of {site}"
            return asked[site]

        def collect(self, tickets: Any) -> list[Reply]:
            return [Reply(ticket, {}, b"x") for ticket in tickets][:1]

    requests = {site: Request({}) for site in ("a", "b", "c")}
    answers = exchange(OneAtATime(), requests, Patience(), seconds=9.0, sleep=slept.append)
    found = [answer.site for answer in answers if not answer.failure]
    assert found == ["a", "b", "c"]
    assert not slept
