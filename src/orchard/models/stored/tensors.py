"""Reading single tensors from safetensors files, however large the files are.

The files are read, not mapped: what a process has touched of a mapped file counts as its memory,
and a checkpoint may be larger than that. A safetensors file is eight bytes with the length of a
header, the header in JSON, and the tensors' bytes behind each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from orchard.models.stored.loading import resolve

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        file: The file.
        start: Its first byte in the file.
        dtype: As stored.
        shape: As stored.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a checkpoint on disk; opening it reads headers only."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of the safetensors files in ``folder``.

        ``model.safetensors`` counts alone where it exists, as in transformers; else the files that
        ``model.safetensors.index.json`` lists; else all there are.

        Args:
            folder: A local folder.

        Raises:
            ValueError: There is no such file, one is damaged or incomplete, or two hold tensors
                of one name.
        """
        self.folder = folder
        tensors: dict[str, StoredTensor] = {}
        for file in _find_files(folder):
            for name, stored in _read_header(file).items():
                if name in tensors:
                    raise ValueError(
                        f"model.path must hold one tensor of each name, got {name} in "
                        f"{tensors[name].file.name} and {file.name}; remove one of the files"
                    )
                tensors[name] = stored
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    def read(self, name: str, *, index: int | None = None) -> Tensor:
        """Read one tensor, or one entry along its first dimension, into memory of its own.

        Args:
            name: As in the file.
            index: Which entry, 0-based; None reads the tensor whole.

        Raises:
            KeyError: No tensor has this name.
            IndexError: There is no such entry.
            ValueError: The file has become shorter since it was opened.
        """
        if name not in self.tensors:
            raise KeyError(
                f"name must be a tensor of the checkpoint, got {name!r}; "
                f"the names start at {next(iter(self.tensors), None)!r}"
            )
        stored = self.tensors[name]
        shape, start = stored.shape, stored.start
        if index is not None:
            if not shape or not 0 <= index < shape[0]:
                raise IndexError(
                    f"index must be in the first dimension of {name}, got {index}; "
                    f"its shape is {shape}"
                )
            shape = shape[1:]
            start += index * math.prod(shape) * stored.dtype.itemsize
        buffer = torch.empty(math.prod(shape) * stored.dtype.itemsize, dtype=torch.uint8)
        _read_into(buffer, stored.file, start)
        return buffer.view(stored.dtype).view(shape)


def open_checkpoint(path: str) -> Checkpoint:
    """Open the checkpoint behind ``path``: a folder, ``orchard:tiny`` or a hub name.

    A hub name is downloaded to the local cache first, configuration and safetensors files.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It holds no usable safetensors files.
    """
    source = resolve(path)
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        # Some publishers add a second copy in a layout of their own.
        folder = Path(
            snapshot_download(
                source,
                allow_patterns=["*.json", "*.safetensors"],
                ignore_patterns=["consolidated*", "original/*", "*/*"],
            )
        )
    return Checkpoint(folder)


def _find_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        got = f"{', '.join(missing)} missing" if missing else f"none in {folder}"
        raise ValueError(
            f"model.path must hold weights in *.safetensors, got {got}; download them again"
        )
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # A damaged length must not become a buffer of its size.
        text = stream.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise _damaged(file, "no header") from error
    header.pop("__metadata__", None)
    begin = 8 + length
    return {name: _stored(file, name, entry, begin, size) for name, entry in header.items()}


def _stored(file: Path, name: str, entry: dict[str, Any], begin: int, size: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"model.path must hold tensors of a plain dtype, got {entry['dtype']} for {name}; "
            "choose a checkpoint that is not quantized"
        )
    start, end = entry["data_offsets"]
    stored = StoredTensor(
        file, begin + start, _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    )
    if stored.num_bytes != end - start or begin + end > size:
        raise _damaged(file, f"{size} bytes")
    return stored


def _read_into(buffer: Tensor, file: Path, start: int) -> None:
    view = buffer.numpy().data
    # Opened for each tensor: threads that read at once then share no position.
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while len(view):
            count = stream.readinto(view)
            if not count:
                raise _damaged(file, f"an end before byte {start + len(buffer)}")
            view = view[count:]


def _damaged(file: Path, got: str) -> ValueError:
    return ValueError(
        f"model.path must hold readable weights, got {got} in {file.name}; download them again"
    )
