"""Updates that somebody wrote by hand who knows every format: none of them changes a round."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from orchard.communication.channel import Channel, Codec
from orchard.communication.quantization import Int8
from orchard.communication.readable import MAX_TEXT
from orchard.communication.sparsification import TopK
from orchard.trees import Tree
from scripted import (
    FIRST,
    SECOND,
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

Make: TypeAlias = Callable[[Header], bytes]
HUGE = "1" + "0" * 400


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


def buffer(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {FIRST: tensor([4, 3], 0, 48), SECOND: tensor([3], 48, 60)}


def layout(tensors: Mapping[str, Any], data: bytes, **facts: Any) -> Make:
    return lambda asked: buffer(
        json.dumps(
            {"__metadata__": {"orchard": json.dumps(update_header(asked, **facts))}} | tensors
        ),
        data,
    )


def said(**facts: Any) -> Make:
    return layout(GOOD, bytes(60), **facts)


def text(old: str, new: str) -> Make:
    """Write one piece of the header otherwise than any JSON writer would."""

    def make(asked: Header) -> bytes:
        own = json.dumps(update_header(asked)).replace(old, new)
        assert new in own
        return buffer(json.dumps({"__metadata__": {"orchard": own}, **GOOD}), bytes(60))

    return make


def twice(again: str) -> Make:
    def make(asked: Header) -> bytes:
        own = json.dumps({"orchard": json.dumps(update_header(asked))})
        one = json.dumps(GOOD[FIRST])
        return buffer(f'{{"__metadata__":{own},"{FIRST}":{one},"{again}":{one}}}', bytes(48))

    return make


def always(message: bytes) -> Make:
    return lambda asked: message


CRAFTED: dict[str, Make] = {
    "a round of 401 digits": text('"round_number": 1', f'"round_number": {HUGE}'),
    "a weight of 401 digits": text("4.0", HUGE),
    "a weight of 1e999": text("4.0", "1e999"),
    "an infinite weight": text("4.0", "Infinity"),
    "a weight of minus nothing": text("4.0", "-0.0"),
    "a number of 100,000 digits": always(buffer('{"a":' + "9" * 100_000 + "}")),
    "60,000 lists in each other": always(buffer("[" * 60_000 + "]" * 60_000)),
    "60,000 objects in the inner header": lambda asked: buffer(
        json.dumps({"__metadata__": {"orchard": '{"a":' * 60_000}, **GOOD}), bytes(60)
    ),
    "a tensor twice": twice(FIRST),
    "a tensor twice, by an escape": twice("\\u006c" + FIRST[1:]),
    "half a surrogate as a name": layout({**GOOD, "\ud800": tensor([3], 60, 72)}, bytes(72)),
    "half a surrogate as a site": said(client_id="\ud800"),
    "another site": said(client_id="a"),
    "a site of escapes": said(client_id="\x1b[2J\n" * 100),
    "tensors that overlap": layout(
        {FIRST: tensor([4, 3], 0, 48), SECOND: tensor([3], 36, 48)}, bytes(48)
    ),
    "tensors at one place": layout(
        {FIRST: tensor([4, 3], 0, 48), SECOND: tensor([3], 0, 12)}, bytes(48)
    ),
    "a hole between tensors": layout(
        {FIRST: tensor([4, 3], 0, 48), SECOND: tensor([3], 60, 72)}, bytes(72)
    ),
    "an end before its start": layout({**GOOD, FIRST: tensor([4, 3], 48, 0)}, bytes(60)),
    "a shape beyond 64 bits": layout({**GOOD, FIRST: tensor([1 << 32, 1 << 32], 0, 48)}, bytes(60)),
    "a shape whose product is 0 in 64 bits": layout(
        {FIRST: tensor([1 << 48] * 3, 0, 0), SECOND: tensor([3], 0, 12)}, bytes(12)
    ),
    "nothing, of a huge shape": layout(
        {FIRST: tensor([1 << 40, 0], 0, 0), SECOND: tensor([3], 0, 12)}, bytes(12)
    ),
    "truth values": layout(
        {FIRST: tensor([4, 3], 0, 12, "BOOL"), SECOND: tensor([3], 12, 24)}, bytes(24)
    ),
    "whole numbers": layout(
        {FIRST: tensor([4, 3], 0, 96, "I64"), SECOND: tensor([3], 96, 108)}, bytes(108)
    ),
    "twice the width": layout(
        {FIRST: tensor([4, 3], 0, 96, "F64"), SECOND: tensor([3], 96, 108)}, bytes(108)
    ),
    "NaN": layout(GOOD, b"\xff" * 60),
    "the largest floats": layout(GOOD, struct.pack("<15f", *[3.4e38] * 15)),
    "nothing": always(b""),
    "seven bytes": always(b"1234567"),
    "a header of -1 bytes": always(b"\xff" * 8 + b"{}"),
    "UTF-16": always(buffer('{"a":1}'.encode("utf-16"))),
    "a byte order mark": always(buffer(b"\xef\xbb\xbf{}")),
    "weights of nothing": layout({}, b""),
    "a weight of another name": layout(
        {FIRST: tensor([4, 3], 0, 48)}, bytes(48), weight={FIRST: 4.0, "x": 4.0}
    ),
    "a later round": said(round_number=2),
    "round 0": said(round_number=0),
    "a round of 1.9": said(round_number=1.9),
    "a weight that is true": said(weight={FIRST: True, SECOND: True}),
    "a weight that is text": said(weight={FIRST: "4", SECOND: "4"}),
    "200,000 metrics": said(metrics={f"client/{number}": 1.0 for number in range(200_000)}),
    "a name of the channel's": layout(
        {**GOOD, "#scales": tensor([3], 60, 72)}, bytes(72), weight={FIRST: 4.0, "#scales": 4.0}
    ),
    "20 MB behind it": layout(GOOD, bytes(20_000_000)),
    "an object for the header": lambda asked: buffer(
        json.dumps({"__metadata__": {"orchard": {"kind": "update"}}, **GOOD}), bytes(60)
    ),
}
SPARSE, EIGHT = Channel(uplink=(TopK(0.5),)), Channel(uplink=(TopK(0.5), Int8()))
MORE: dict[str, tuple[Channel, Callable[[Tree], Tree]]] = {
    "positions that are all marked": (SPARSE, lambda t: {"#positions": t["#positions"] | 255}),
    "positions of which none is": (SPARSE, lambda t: {"#positions": t["#positions"] * 0}),
    "positions a thousand times": (
        SPARSE,
        lambda t: {"#positions": torch.cat([t["#positions"]] * 1000)},
    ),
    "one position": (SPARSE, lambda t: {"#positions": t["#positions"][:1]}),
    "positions that are floats": (SPARSE, lambda t: {"#positions": t["#positions"].float()}),
    **{
        f"shapes of {numbers}": (SPARSE, lambda t, n=numbers: {"#shapes": torch.tensor(n)})  # type: ignore[misc]
        for numbers in (
            [2, 1 << 31, 1 << 31, 1, 3],
            [2, -4, -3, 1, 3],
            [2, -(1 << 63), 3, 1, 3],
            [2, 1 << 62, 4, 1, 3],
            [2, 0, 3, 1, 3],
            [-1, 4, 3],
            [1 << 40, 4, 3, 1, 3],
            [2, 3, 4, 1, 3],
            [2.0, 4.0, 3.0, 1.0, 3.0],
            [True, True],
        )
    },
    "whole numbers for values": (SPARSE, lambda t: {FIRST: t[FIRST].long()}),
    "a number for a row": (SPARSE, lambda t: {FIRST: t[FIRST][0]}),
    **{
        f"scales of {value}": (
            EIGHT,
            lambda t, v=value: {"#scales": torch.full_like(t["#scales"], v)},  # type: ignore[misc]
        )
        for value in (float("inf"), float("nan"), -1.0, 3e38)
    },
    "scales of another width": (EIGHT, lambda t: {"#scales": t["#scales"].float()}),
    "scales in a table": (EIGHT, lambda t: {"#scales": t["#scales"][None]}),
}


def check(folder: Path, make: Make, channel: Channel) -> None:
    """Demand that an update is refused, in a few words, and that the round is as without it."""

    def bad(asked: Header) -> tuple[Any, bytes]:
        return header_of("bad", asked), make(asked)

    state, result = run(folder / "run", ScriptedPost(bad, channel=channel), num_rounds=1)
    expected, _ = run(folder / "without", ScriptedPost(None, channel=channel), num_rounds=1)
    assert same(state.shared, expected.shared)
    assert result["num_rounds"] == 1
    (reason,) = reasons(folder / "run") or ["left alone"]
    assert reason.isprintable()
    assert len(reason) <= MAX_TEXT
    assert "Error" not in reason.split(":")[0]  # a check said so, and no accident


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_update_changes_nothing(kind: str, tmp_path: Path) -> None:
    check(tmp_path, CRAFTED[kind], Channel())


@pytest.mark.parametrize("kind", MORE)
def test_a_crafted_encoding_changes_nothing(kind: str, tmp_path: Path) -> None:
    channel, change = MORE[kind]

    def make(asked: Header) -> bytes:
        sent = dict(Codec(channel.uplink).encode(honest("bad").delta))
        return raw_update(update_header(asked), {**sent, **change(sent)})

    check(tmp_path, make, channel)
