"""Messages become bytes and messages again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import orchard
from orchard import trees
from orchard.communication.messages import (
    LocalSettings,
    Task,
    Update,
    decode_task,
    decode_update,
    encode_task,
    encode_update,
    read_update_header,
)

SETTINGS = LocalSettings(steps=5, epochs=0, learning_rate=4e-5)
VALUES = torch.tensor([1.0, -0.0, float("nan"), float("inf"), 1e-40, 3.3e38])
TREES = {
    "float32": {"a": VALUES, "layers.3.é.lora_A": torch.randn(3, 4, 5)},
    "bfloat16": {"a": VALUES.to(torch.bfloat16)},
    "int64": {"a": torch.tensor([2**62 + 1, -(2**63)])},
    "mixed": {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor([1])},
    "empty tree": {},
    "empty tensor": {"a": torch.zeros(0, 3)},
    "scalar": {"a": torch.tensor(1.5)},
    "transposed": {"a": torch.arange(6.0).view(2, 3).t()},
    "every other": {"a": torch.arange(10.0)[::2], "b": torch.arange(4).view(2, 2)[:, 1]},
    "expanded": {"a": torch.tensor([[1.0], [2.0]]).expand(2, 4)},
    "in a graph": {"a": torch.ones(3, requires_grad=True) * 2},
}


def task_of(tree: trees.Tree) -> Task:
    return Task(round_number=3, shared=tree, settings=SETTINGS, evaluate_local=True)


def update_of(tree: trees.Tree) -> Update:
    return Update(
        client_id="office é/1",
        round_number=3,
        delta=tree,
        weight={name: 0.1 + index for index, name in enumerate(tree)},
        metrics={"client/train_loss": 1 / 3},
    )


@pytest.mark.parametrize("kind", TREES)
def test_a_decoded_task_is_the_encoded_one_bit_for_bit(kind: str) -> None:
    task = task_of(TREES[kind])
    found = decode_task(encode_task(task))
    assert trees.digest(found.shared) == trees.digest(task.shared)
    assert (found.round_number, found.settings, found.evaluate_local) == (3, SETTINGS, True)


@pytest.mark.parametrize("kind", TREES)
def test_a_decoded_update_is_the_encoded_one_bit_for_bit(kind: str) -> None:
    update = update_of(TREES[kind])
    found = decode_update(encode_update(update))
    assert trees.digest(found.delta) == trees.digest(update.delta)
    assert found.weight == update.weight
    assert found.metrics == update.metrics
    assert (found.client_id, found.round_number) == (update.client_id, 3)


@settings(deadline=None, max_examples=50)
@given(weight=st.floats(0, allow_nan=False, allow_infinity=False), client=st.text())
def test_weights_and_names_cross_exactly(weight: float, client: str) -> None:
    update = Update(client, 1, {"a": torch.ones(1)}, {"a": weight}, {"m/x": -weight})
    found = decode_update(encode_update(update))
    assert found.weight == {"a": weight}
    assert found.metrics == {"m/x": -weight}
    assert found.client_id == client


def test_decoded_tensors_are_writable_and_own_their_memory() -> None:
    message = encode_task(task_of({"a": torch.ones(3)}))
    decode_task(message).shared["a"].add_(1)
    assert decode_task(message).shared["a"].tolist() == [1.0, 1.0, 1.0]


def test_the_same_message_has_the_same_bytes() -> None:
    assert encode_update(update_of(TREES["mixed"])) == encode_update(update_of(TREES["mixed"]))


def test_the_header_can_be_read_alone() -> None:
    message = encode_update(update_of({"a": torch.ones(1000)}))
    header = read_update_header(message[: len(message) - 4000])
    assert (header.client_id, header.round_number) == ("office é/1", 3)


@pytest.mark.parametrize("decode", [decode_task, decode_update])
@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\x80\x04",
        b"\xff" * 40,
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        save({"a": torch.ones(1)}),
        save({"a": torch.ones(1)}, metadata={"orchard": "[1]"}),
        save({"a": torch.ones(1)}, metadata={"orchard": "no json"}),
        save({}, metadata={"orchard": json.dumps({"kind": "greeting"})}),
    ],
    ids=[
        "empty",
        "two bytes",
        "ones",
        "no metadata",
        "a list",
        "other safetensors",
        "header is a list",
        "header is no JSON",
        "other kind",
    ],
)
def test_junk_is_an_error(decode: object, junk: bytes) -> None:
    with pytest.raises(ValueError, match=r"^message "):
        decode(junk)  # type: ignore[operator]


@settings(deadline=None)
@given(junk=st.binary(max_size=200))
def test_random_bytes_are_an_error(junk: bytes) -> None:
    with pytest.raises(ValueError, match=r"^message must be a safetensors buffer"):
        decode_update(junk)


@settings(deadline=None)
@given(data=st.data())
def test_a_cut_message_is_an_error(data: st.DataObject) -> None:
    message = encode_update(update_of(TREES["mixed"]))
    length = data.draw(st.integers(0, len(message) - 1))
    with pytest.raises(ValueError, match=r"^message must "):
        decode_update(message[:length])


@pytest.mark.parametrize("kind", ["task", "update"])
def test_a_header_that_lacks_a_field_is_an_error(kind: str) -> None:
    message = save({"a": torch.ones(1)}, metadata={"orchard": json.dumps({"kind": kind})})
    with pytest.raises(ValueError, match=r"^message "):
        (decode_task if kind == "task" else decode_update)(message)


def test_a_message_of_the_other_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^message must be a task, got update; "):
        decode_task(encode_update(update_of({})))
    with pytest.raises(ValueError, match=r"^message must be an update, got task; "):
        decode_update(encode_task(task_of({})))


@pytest.mark.parametrize("weight", [{}, {"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_an_update_whose_weights_have_other_names_is_an_error(weight: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^weight must have the names of delta, got a diff"):
        Update("a", 1, {"a": torch.ones(1), "b": torch.ones(1)}, weight)


def test_a_received_update_with_other_names_is_an_error() -> None:
    header = {"kind": "update", "client_id": "a", "round_number": 1, "weight": {}, "metrics": {}}
    message = save({"a": torch.ones(1)}, metadata={"orchard": json.dumps(header)})
    with pytest.raises(ValueError, match=r"^weight must have the names of delta"):
        decode_update(message)


def test_a_metric_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        encode_update(Update("a", 1, {}, {}, {"client/train_loss": float("nan")}))


def test_the_package_never_unpickles() -> None:
    sources = sorted(Path(orchard.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    forbidden = re.compile(r"pickle|torch\.load\(|allow_pickle|weights_only|joblib|shelve|marshal")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sources
        for line in path.read_text().splitlines()
        if forbidden.search(line) and "unpickled" not in line
    ]
    assert found == []
