"""Tensors stand in the buffer that was received, and a buffer that is not in order is refused."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from orchard import trees
from orchard.communication.buffers import join_tensors, view_tensors
from orchard.communication.channel import Cast, Channel
from orchard.communication.messages import Update, decode_update, encode_update

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def split(message: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(message[:8], "little")
    return json.loads(message[8 : 8 + size]), message[8 + size :]


def joined(layout: dict[str, Any], data: bytes) -> bytes:
    header = json.dumps(layout).encode()
    return len(header).to_bytes(8, "little") + header + data


def about(start: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_every_dtype_is_what_safetensors_wrote() -> None:
    tree = {str(dtype): torch.arange(7).to(dtype).view(1, 7) for dtype in DTYPES}
    tree |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    message = save(tree)
    found = view_tensors(message, split(message)[0])
    assert trees.digest(found) == trees.digest(tree)


def test_an_update_stands_in_its_message_and_nobody_is_warned() -> None:
    sent = {"a": torch.randn(1000), "b": torch.randn(10, 3)}
    message = bytearray(encode_update(Update("c", 1, sent, dict.fromkeys(sent, 1.0))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode_update(bytes(message)).delta
        assert trees.digest(found) == trees.digest(sent)
    aliased = decode_update(message).delta
    message[-4:] = torch.tensor([7.0]).numpy().tobytes()
    assert aliased["b"][-1, -1] == 7.0


def test_a_tensor_at_an_odd_place_is_read_too() -> None:
    layout = {"a": about(0, 1, [1], "U8"), "b": about(1, 9, [2])}
    message = joined(layout, b"\x05" + torch.tensor([1.5, -2.0]).numpy().tobytes())
    found = view_tensors(message, layout)
    assert found["a"].tolist() == [5]
    assert found["b"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    "layout",
    [
        {"a": about(0, 8, [2])},
        {"a": about(0, 16, [2])},
        {"a": about(0, 8, [2]), "b": about(4, 12, [2])},
        {"a": about(0, 4, [1]), "b": about(8, 12, [1])},
        {"a": about(4, 12, [2])},
        {"a": about(-4, 8, [3])},
        {"a": about(0, 12, [-3])},
        {"a": about(0, 12, [-3, -1])},
        {"a": about(0, 16, [2, 2])},
        {"a": about(0, 12, [3.0])},
        {"a": about(0, 12, ["3"])},
        {"a": about(0, 12, [3], "F8")},
        {"a": about(0, 12, [2**40, 2**40])},
        {"a": {"dtype": "F32", "shape": [3]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": "ab"}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4, 12]}},
        {"a": 12},
        {},
    ],
)
def test_a_layout_that_is_not_that_of_the_bytes_is_refused(layout: dict[str, Any]) -> None:
    data = torch.ones(3).numpy().tobytes()
    with pytest.raises(ValueError, match=r"^message must hold complete tensors, got "):
        view_tensors(joined(layout, data), layout)


def test_an_update_in_bfloat16_is_widened_as_it_is_read() -> None:
    sent = {f"{i}": torch.randn(50) for i in range(3)}
    channel = Channel((Cast(torch.bfloat16),))
    message = channel.pack_update(Update("c", 1, sent, dict.fromkeys(sent, 1.0)))
    received = channel.unpack_update(message).delta
    assert list(received) == list(sent)
    assert len(received) == 3
    for name, tensor in received.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, sent[name].to(torch.bfloat16).float())
        assert received[name].data_ptr() != tensor.data_ptr()


def test_a_buffer_is_what_safetensors_writes() -> None:
    tree = {"b": torch.randn(3, 4), "a": torch.randn(5), "é": torch.randn(2, 2).t()}
    own = {name: tensor.contiguous() for name, tensor in tree.items()}
    metadata = {"orchard": json.dumps({"é": 1})}
    assert join_tensors(tree, metadata=metadata) == save(own, metadata=metadata)


def test_safetensors_reads_every_dtype_of_a_buffer() -> None:
    tree = {str(dtype): torch.arange(7).to(dtype) for dtype in DTYPES}
    tree |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "": torch.ones(1)}
    found = load(join_tensors(tree, metadata={}))
    assert trees.digest(found) == trees.digest(tree)


def test_a_dtype_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^a must be of BOOL, .* got torch\.complex64; cast it"):
        join_tensors({"a": torch.zeros(1, dtype=torch.complex64)}, metadata={})
