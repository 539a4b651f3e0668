"""What passes the door is of the type that was named; everything else is one kind of error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.communication import door
from orchard.communication.bounded_json import MAX_DEPTH, read_json
from orchard.communication.readable import readable

JOIN = {"kind": "join", "run": "r", "recipe": "", "methods": {"mine:a": "0" * 64}}
ROUND = {
    "kind": "round",
    "run": "r",
    "recipe": "",
    "site": "north",
    "index": 0,
    "num_clients": 2,
    "round": 1,
    "evaluate": ["global"],
    "train": True,
}
DONE = {
    "site": "north",
    "base_digest": "b",
    "evaluation": {"global/loss": 1.0},
    "evaluation_seconds": 2.0,
}
UPDATE = {
    "kind": "update",
    "client_id": "north",
    "round_number": 1,
    "weight": {"a": 4.0},
    "metrics": {"client/train_loss": 1.0},
}
TASK = {
    "kind": "task",
    "round_number": 1,
    "settings": {"steps": 1, "epochs": 0, "learning_rate": 0.1},
    "evaluate_local": False,
    "since": "",
}
TENSORS = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def message(kind: Any) -> Callable[[Any], object]:
    return lambda value: door.read_message_header(json.dumps(value), kind)


READERS: dict[str, tuple[Callable[[Any], object], dict[str, Any]]] = {
    "who": (door.read_request, {"kind": "who"}),
    "alive": (door.read_request, {"kind": "alive"}),
    "join": (door.read_request, JOIN),
    "round": (door.read_request, ROUND),
    "introduction": (door.read_introduction, {"site": "north"}),
    "joined": (door.read_join_reply, {"site": "north", "num_examples": 7}),
    "refused to join": (door.read_join_reply, {"refused": "method", "option": "strategy.name"}),
    "refused": (door.read_round_reply, {"refused": "method", "site": "north"}),
    "lacks values": (door.read_round_reply, {"lacks_values": True, "site": "north"}),
    "done": (door.read_round_reply, DONE),
    "failed": (door.read_failure, {"error": "no memory"}),
    "update": (message(door.UpdateHeader), UPDATE),
    "task": (message(door.TaskHeader), TASK),
    "tensors": (door.read_tensors, TENSORS),
}


@pytest.mark.parametrize("kind", READERS)
def test_what_we_send_passes(kind: str) -> None:
    read, value = READERS[kind]
    assert read(value) == read(json.loads(json.dumps(value)))


@pytest.mark.parametrize("kind", sorted(READERS.keys() - {"tensors", "failed"}))
def test_a_key_that_is_not_named_is_refused(kind: str) -> None:
    read, value = READERS[kind]
    with pytest.raises(door.MalformedError, match="must have the fields of its kind"):
        read({**value, "more": 1})


WRONG = [None, True, "1", "1e3", 1.9, 10**400, float("1e400"), [], {}, [1], {"a": 1}, "\ud800"]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_value_of_another_type_passes_nowhere(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(READERS.keys() - {"failed", "refused"})))
    read, value = READERS[kind]
    own = json.loads(json.dumps(value))
    places = list(_places(own))
    if not places:
        return
    container, key = data.draw(st.sampled_from(places))
    old = container[key]
    others = [
        new for new in WRONG if type(new) is not type(old) and not isinstance(new, float | dict)
    ]
    if isinstance(old, float):
        others = [new for new in others if type(new) is not int or new > 10**308]
    container[key] = data.draw(st.sampled_from(others))
    if kind == "joined" and container[key] is None:
        return
    if kind in ("lacks values", "done", "refused to join") and container[key] is None:
        return  # who answers need not say so
    with pytest.raises(door.MalformedError):
        read(own)


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, own in list(items):
        if isinstance(own, dict | list) and own:
            yield from _places(own)
        elif key != "kind":
            yield value, key


@pytest.mark.parametrize("number", [10**400, 10**30, -1, True, 1.0, "1", None])
def test_a_round_is_a_whole_number_in_range(number: object) -> None:
    with pytest.raises(door.MalformedError):
        door.read_request({**ROUND, "round": number})
    header = json.dumps({**UPDATE, "round_number": number})
    with pytest.raises(door.MalformedError):
        door.read_message_header(header, door.UpdateHeader)


@pytest.mark.parametrize("opened", ['{"a":', "["])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 60_000])
def test_depth_is_bounded_before_anything_is_built(opened: str, depth: int) -> None:
    with pytest.raises(ValueError, match=f"nested at most {MAX_DEPTH} deep"):
        read_json(opened * depth, max_bytes=10**6)


def test_brackets_in_texts_are_no_depth() -> None:
    text = json.dumps({"a": '[{"' * 100 + "\\"})
    assert read_json(text, max_bytes=1000) == json.loads(text)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"b": {"a": 1, "\\u0061": 2}}', "NaN", "[Infinity]", "", "{"]
)
def test_what_can_be_read_in_two_ways_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"JSON must|Expecting"):
        read_json(text, max_bytes=1000)


def test_length_is_bounded_and_counted_in_bytes() -> None:
    assert read_json('"é"', max_bytes=4) == "é"
    for text in ('"é"', b'"abc"'):
        with pytest.raises(ValueError, match="at most 3 bytes"):
            read_json(text, max_bytes=3)


@pytest.mark.parametrize("text", ['"' + '\\"' * 400_000, '"' * 800_001, "\\" * 800_000])
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"JSON|Expecting|Unterminated|Extra"):
        read_json(text, max_bytes=10**6)
    assert time.process_time() - started < 2.0


@settings(deadline=None)
@given(text=st.text(), limit=st.integers(30, 200))
def test_a_readable_text_is_short_and_on_one_line(text: str, limit: int) -> None:
    shown = readable(text, limit=limit)
    assert len(shown) <= limit
    assert shown.isprintable()
    if text.isprintable() and len(text) <= limit:
        assert shown == text


def test_a_readable_text_says_what_was_cut() -> None:
    assert readable("x" * 20_000_000, limit=40).endswith("... (20000000 characters)")
    assert readable("a\n\x1b[31m\u202e\ud800") == "a\\x0a\\x1b[31m\\u202e\\ud800"


def test_a_failure_is_fit_to_be_shown() -> None:
    assert door.read_failure({"error": "no\nmemory"}) == "no\\x0amemory"
    assert door.read_failure(DONE) == ""
    with pytest.raises(door.MalformedError):
        door.read_failure({"error": {"a": 1}})
