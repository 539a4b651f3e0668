"""Safetensors buffers, written with one copy of the tensors and read with none.

``safetensors.torch.load`` copies every tensor out of the buffer, which takes longer than adding it
to a sum; here the layout is checked and each tensor is a view. ``safetensors.torch.save`` takes
0.05 ms a tensor, as much as all else that a round of small tensors costs.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, TypeAlias

import torch

from orchard.communication import door

_ALIGNMENT = 8  # of the first tensor, in bytes
Buffer: TypeAlias = bytes | bytearray

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def join_tensors(tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors buffer, its widest dtypes first and then by name.

    Raises:
        ValueError: A dtype is not one that can be sent.
    """
    parts: list[Any] = []
    layout: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        if tensor.dtype not in _NAMES:
            raise ValueError(
                f"{name} must be of {', '.join(_DTYPES)}, got {tensor.dtype}; cast it before"
            )
        start, end = end, end + tensor.nbytes
        layout[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        # numpy has no bfloat16.
        flat = tensor.detach().cpu().reshape(-1)
        if flat.stride() != (1,):  # one value may have any stride
            flat = flat.clone(memory_format=torch.contiguous_format)
        parts.append(flat.view(torch.uint8).numpy())
    header = json.dumps(layout, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return b"".join([len(header).to_bytes(8, "little"), header, *parts])


def view_tensors(buffer: Buffer, layout: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors buffer, in the order of their bytes.

    They keep the buffer alive. Those of ``bytes`` are for reading only, which torch cannot enforce.

    Args:
        buffer: The whole file: size of the header, header, tensors.
        layout: The header without its metadata.

    Raises:
        ValueError: The tensors are not exactly the bytes after the header.
    """
    position = 8 + int.from_bytes(buffer[:8], "little")
    base, tensors = position, {}
    try:
        entries = [
            (*about.data_offsets, name, _DTYPES[about.dtype], about.shape)
            for name, about in door.read_tensors(layout).items()
        ]
        entries.sort(key=itemgetter(0, 1))
        with warnings.catch_warnings():
            # torch warns once of a buffer that must not be written.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            for start, end, name, dtype, shape in entries:
                count = math.prod(shape)
                if (
                    not position == base + start <= base + end <= len(buffer)
                    or end - start != count * dtype.itemsize
                ):
                    raise ValueError(f"{name} stands at {start}..{end}")
                if count == 0:
                    tensors[name] = torch.empty(shape, dtype=dtype)
                elif position % dtype.itemsize:
                    # Not where safetensors would have put it.
                    own = bytearray(buffer[position : base + end])
                    tensors[name] = torch.frombuffer(own, dtype=dtype).view(shape)
                else:
                    tensors[name] = torch.frombuffer(
                        buffer, dtype=dtype, count=count, offset=position
                    ).view(shape)
                position = base + end
        if position != len(buffer):
            raise ValueError(f"{len(buffer) - position} bytes belong to no tensor")
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"message must hold complete tensors, got {len(buffer)} bytes that do not decode "
            f"({error}); resend it"
        ) from error
    return tensors
