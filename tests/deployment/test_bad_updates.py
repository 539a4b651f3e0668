"""Updates that must not count: each is refused with a reason, and the round goes on without it."""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from orchard.communication.audit import read_audit
from orchard.communication.channel import Channel
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.engine.exchange import Patience, Reply
from orchard.server.admission import Admission
from orchard.server.checkpoint import ServerState
from scripted import (
    FIRST,
    SECOND,
    SHARED,
    Header,
    ScriptedPost,
    header_of,
    honest,
    raw_update,
    run,
    update_header,
)
from sites import same

BAD = 3.0  # what the bad client's honest update would be


def encoded(update: Update) -> bytes:
    return Channel().pack_update(update)


def changed(**facts: Any) -> bytes:
    return encoded(replace(honest("bad"), **facts))


def with_delta(name: str, value: torch.Tensor) -> bytes:
    own = honest("bad")
    delta = {**own.delta, name: value}
    return encoded(replace(own, delta=delta, weight=dict.fromkeys(delta, 4.0)))


def with_value(number: float) -> bytes:
    # The encoder would not send it.
    tensors = {**honest("bad").delta, FIRST: value_of(number)}
    return rewritten(lambda header: None, tensors)


def with_weight(weight: float) -> bytes:
    # As JSON, which takes NaN and infinity where the encoder would not.
    return rewritten(lambda header: header["weight"].__setitem__(FIRST, weight))


def rewritten(change: Callable[[dict[str, Any]], object], tensors: Any = None) -> bytes:
    """Return an honest message whose header was changed by somebody who knows the format."""
    header = update_header({"round": 1})
    change(header)
    return raw_update(header, tensors)


def with_raw_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return an honest message whose safetensors header was changed."""
    message = encoded(honest("bad"))
    size = int.from_bytes(message[:8], "little")
    header = json.loads(message[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + message[8 + size :]


def value_of(number: float) -> torch.Tensor:
    tensor = torch.full((4, 3), BAD)
    tensor[2, 1] = number
    return tensor


BAD_UPDATES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "safetensors buffer"),
    "noise": (lambda: bytes(range(256)) * 2, "safetensors buffer"),
    "a pickle": (lambda: pickle.dumps({FIRST: [1.0]}), "safetensors"),
    "a header longer than the message": (
        lambda: (1 << 40).to_bytes(8, "little") + b"{}",
        "claim a header of",
    ),
    "cut off": (lambda: encoded(honest("bad"))[:-7], "complete tensors"),
    "padded": (lambda: encoded(honest("bad")) + bytes(100), "complete tensors"),
    "far too long": (lambda: encoded(honest("bad")) + bytes(200_000), "at most"),
    "a header that is no object": (
        lambda: (2).to_bytes(8, "little") + b"[]" + bytes(8),
        "safetensors header",
    ),
    "a task": (
        lambda: Channel().broadcast(Task(1, SHARED, LocalSettings(1, 0, 0.1)), {}).whole,
        "must be an update",
    ),
    "without our header": (lambda: save({FIRST: torch.zeros(4, 3)}), "orchard header"),
    "without weights": (lambda: rewritten(lambda h: h.pop("weight")), "missing or wrong"),
    "weights that are a list": (
        lambda: rewritten(lambda h: h.__setitem__("weight", [1.0, 1.0])),
        "missing or wrong",
    ),
    "another client's name": (lambda: changed(client_id="a"), "who was asked"),
    "another client's update": (lambda: encoded(honest("a")), "who was asked"),
    "a replay of an earlier round": (lambda: changed(round_number=0), "round must be 1"),
    "a later round": (lambda: changed(round_number=2), "round must be 1"),
    "an unknown name": (lambda: with_delta("layers.9.q_proj.lora_A", torch.ones(2)), "name of"),
    "a personal tensor": (lambda: with_delta("layers.0.graft.gate", torch.ones(3)), "name of"),
    "another shape": (lambda: with_delta(FIRST, torch.ones(4, 4)), "shape of"),
    "turned over": (lambda: with_delta(FIRST, torch.ones(3, 4)), "shape of"),
    "a scalar": (lambda: with_delta(FIRST, torch.tensor(1.0)), "shape of"),
    "whole numbers": (lambda: with_delta(FIRST, torch.ones(4, 3, dtype=torch.int32)), "floating"),
    "wider numbers than any recipe sends": (
        lambda: with_delta(FIRST, torch.ones(4, 3, dtype=torch.float64)),
        "at most 32 bits",
    ),
    "NaN": (lambda: with_value(float("nan")), "finite"),
    "infinity": (lambda: with_value(float("inf")), "finite"),
    "minus infinity": (lambda: with_value(float("-inf")), "finite"),
    "an absurd norm": (lambda: with_delta(FIRST, value_of(1e20)), "norm of the update"),
    "a norm a little too large": (lambda: with_delta(FIRST, value_of(200.0)), "norm of the update"),
    "a negative weight": (lambda: with_weight(-1.0), "weight of"),
    "a weight that is NaN": (lambda: with_weight(float("nan")), "finite numbers, got NaN"),
    "an infinite weight": (lambda: with_weight(float("inf")), "finite numbers, got Infinity"),
    "an absurd weight": (lambda: with_weight(1e30), "weight of"),
    "a weight without a tensor": (
        lambda: rewritten(lambda h: h["weight"].__setitem__("layers.0.router.9", 1.0)),
        "names of delta",
    ),
    "a tensor without a weight": (
        lambda: rewritten(lambda h: h["weight"].pop(FIRST)),
        "names of delta",
    ),
    "a metric that is NaN": (
        lambda: rewritten(lambda h: h["metrics"].__setitem__("client/train_loss", float("nan"))),
        "finite numbers, got NaN",
    ),
    "a metric that is no number": (
        lambda: rewritten(lambda h: h["metrics"].__setitem__("client/train_loss", "low")),
        "missing or wrong",
    ),
    "a metric that hides another": (
        lambda: rewritten(lambda h: h["metrics"].__setitem__("kind", 1.0)),
        "a method here measures",
    ),
    "a shape below zero": (
        lambda: with_raw_header(lambda h: h[FIRST].__setitem__("shape", [-4, -3])),
        "whole numbers",
    ),
    "a shape of petabytes": (
        lambda: with_raw_header(lambda h: h[FIRST].__setitem__("shape", [1 << 25, 1 << 25])),
        "complete tensors",
    ),
    "tensors that overlap": (
        lambda: with_raw_header(
            lambda h: h[SECOND].__setitem__("data_offsets", [0, 12]),
        ),
        "complete tensors",
    ),
}


def run_round(folder: Path, bad: bytes | None) -> ServerState:
    def answer(asked: Header) -> tuple[Any, Any] | Reply:
        if bad is None:
            return Reply("", error="away")
        return header_of("bad", asked), bad

    state, _ = run(
        folder,
        ScriptedPost(answer),
        num_rounds=1,
        patience=Patience(quorum=2, attempts=1, poll_seconds=0.0),
        admission=Admission(max_update_norm=100.0, max_weight=1e9),
    )
    return state


@pytest.mark.parametrize("kind", BAD_UPDATES)
def test_a_bad_update_is_refused_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    make, reason = BAD_UPDATES[kind]
    without = run_round(tmp_path / "without", None)
    state = run_round(tmp_path / "with", make())
    assert same(state.shared, without.shared)
    refused = [e for e in read_audit(tmp_path / "with" / "audit.jsonl") if e["event"] == "refused"]
    assert [(event["site"], event["round"]) for event in refused] == [("bad", 1)]
    assert reason in refused[0]["reason"]


def test_the_honest_update_of_that_client_counts(tmp_path: Path) -> None:
    without = run_round(tmp_path / "without", None)
    state = run_round(tmp_path / "with", encoded(honest("bad")))
    assert state.shared[FIRST].unique().tolist() == [2.0]
    assert without.shared[FIRST].unique().tolist() == [1.5]
    rewritten_message = rewritten(lambda header: None)
    assert same(run_round(tmp_path / "again", rewritten_message).shared, state.shared)


def test_nothing_in_the_code_unpickles() -> None:
    source = Path(__file__).parents[2] / "src" / "orchard"
    words = ("import pickle", "pickle.load", "torch.load(", "allow_pickle=True", "import dill")
    found = [
        (path.name, word)
        for path in source.rglob("*.py")
        for word in words
        if word in path.read_text()
    ]
    assert found == []


PAGE = Path(__file__).parents[2] / "docs" / "refused_updates.md"


def test_the_page_lists_them_all() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[1] for row in rows] == list(BAD_UPDATES)


def main() -> None:
    """Write the page: each bad update, and what the coordinator logged."""
    lines = [
        "# Updates that are refused",
        "",
        "Two honest sites and one that sends what stands here, in a round of FedAvg. Each is",
        "refused, and the global model afterwards is, bit for bit, the one without that site.",
        "`tests/deployment/test_bad_updates.py` sends them and, as a program, writes this page.",
        "",
        "| # | sent | logged |",
        "| ---: | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, (make, _)) in enumerate(BAD_UPDATES.items(), start=1):
            run_round(Path(folder) / str(number), make())
            events = read_audit(Path(folder) / str(number) / "audit.jsonl")
            (reason,) = [event["reason"] for event in events if event["event"] == "refused"]
            lines.append(f"| {number} | {kind} | {reason.replace('|', '/')} |")
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
