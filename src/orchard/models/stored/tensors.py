"""Reading single tensors from safetensors files, however large the files are.

The files are read, not mapped: what a process has touched of a mapped file counts as its memory,
and a checkpoint may be larger than that. A safetensors file is eight bytes with the length of a
header, the header in JSON, and the tensors' bytes behind each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from orchard.hub import cached_copy
from orchard.library_errors import first_line
from orchard.models.stored.deepseek_moe import (
    MODEL_TYPE,
    is_rewritten,
    to_qwen2_moe_names,
)
from orchard.models.stored.sources import load_config, locate

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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        file: The file.
        start: Its first byte in the file.
        dtype: As stored.
        shape: As stored.
        factor: What it is multiplied with when it is read; 0 reads nothing.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    factor: int = 1

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
            ValueError: There is no such file, one is damaged or incomplete, two hold tensors of
                one name, or one lacks a tensor that the index says it has.
        """
        self.folder = folder
        # What from_pretrained finds by itself.
        self.is_indexed = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
        files, listed = _find_files(folder)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, stored in _read_header(file).items():
                if name in tensors:
                    raise ValueError(
                        f"model.path must hold one tensor of each name, got {name} in "
                        f"{tensors[name].file.name} and {file.name}; remove one of the files"
                    )
                tensors[name] = stored
        for name, file_name in listed.items():
            if name not in tensors or tensors[name].file != folder / file_name:
                raise ValueError(
                    f"{file_name} must hold {name}, as {INDEX} says, got a file without it; "
                    "download both again"
                )
        if _is_deepseek_moe(folder):
            tensors, self.is_indexed = _as_qwen2_moe(tensors), False
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
        if stored.factor == 0:
            return torch.zeros(shape, dtype=stored.dtype)
        buffer = torch.empty(math.prod(shape) * stored.dtype.itemsize, dtype=torch.uint8)
        _read_into(buffer, stored.file, start)
        values = buffer.view(stored.dtype).view(shape)
        return values if stored.factor == 1 else values * stored.factor


def open_checkpoint(path: str) -> Checkpoint:
    """Open the checkpoint behind ``path``: a folder, ``orchard:tiny`` or a hub name.

    A hub name is downloaded to the local cache first, configuration and safetensors files.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It holds no usable safetensors files.
    """
    source = locate(path)
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


class LazyTensor:
    """A tensor of a state dict that is read when transformers comes to it."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        """Keep what reads it."""
        self.read = read

    def __getitem__(self, index: object) -> Tensor:
        """Read it whole."""
        return self.read()


def lazy_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Return all tensors of a checkpoint, to be read one by one."""
    return {name: LazyTensor(partial(checkpoint.read, name)) for name in checkpoint.tensors}


def read_headers(path: str) -> Mapping[str, StoredTensor]:
    """Return where the tensors behind ``path`` lie; of a hub name, without downloading them.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It holds no usable safetensors files.
    """
    source = locate(path)
    if Path(source).is_dir():
        return Checkpoint(Path(source)).tensors
    copy = cached_copy(source, kind="model")
    if copy is not None and (copy / SINGLE).is_file():
        return Checkpoint(copy).tensors
    from huggingface_hub import get_safetensors_metadata

    try:
        metadata = get_safetensors_metadata(source)
    except Exception as error:  # of the network, of the hub, or of what a stranger put there
        raise ValueError(
            f"model.path must hold weights in *.safetensors, got {path} ({first_line(error)}); "
            "choose another checkpoint, or try again"
        ) from error
    found = {}
    for file_name, file in metadata.files_metadata.items():
        for name, info in file.tensors.items():
            start = info.data_offsets[0]
            dtype = _plain_dtype(name, info.dtype)
            found[name] = StoredTensor(Path(file_name), start, dtype, tuple(info.shape))
    return _as_qwen2_moe(found) if is_rewritten(load_config(path)) else found


def unread_files(path: str) -> list[str]:
    """Return the names of safetensors files behind ``path`` that do not count; of a folder alone.

    Such is a shard that the index does not list, or anything beside ``model.safetensors``.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It holds no usable safetensors files.
    """
    folder = Path(locate(path))
    if not folder.is_dir():
        return []
    counted, _ = _find_files(folder)
    return sorted(file.name for file in folder.glob("*.safetensors") if file not in counted)


def _is_deepseek_moe(folder: Path) -> bool:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # said where the configuration is read
        return False
    return isinstance(content, dict) and content.get("model_type") == MODEL_TYPE


def _as_qwen2_moe(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    found = {}
    for own, (name, factor) in to_qwen2_moe_names(tensors).items():
        stored = tensors[name]
        shape = stored.shape if factor else (1, *stored.shape[:1])
        found[own] = replace(stored, shape=shape, factor=factor)
    return found


def _find_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """Return the files that count, and what an index says of who holds which tensor."""
    listed: Mapping[str, str] = {}
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], listed
    if (folder / INDEX).is_file():
        listed = _read_index(folder / INDEX)
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        got = f"{', '.join(missing)} missing" if missing else f"none in {folder}"
        raise ValueError(
            f"model.path must hold weights in *.safetensors, got {got}; download them again"
        )
    return files, listed


def _read_index(file: Path) -> Mapping[str, str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
        weight_map = dict(content["weight_map"])
        dict(content["metadata"])  # which transformers asks for
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file.name} must name the file of each tensor in a weight_map, beside its metadata, "
            f"got one that cannot be read ({first_line(error)}); download it again"
        ) from error
    for name, file_name in weight_map.items():
        path = Path(file_name) if isinstance(file_name, str) else Path("..")
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise ValueError(
                f"{file.name} must name files *.safetensors beside it, got {file_name!r} for "
                f"{name}; download it again"
            )
    return weight_map


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON, in which a name may stand once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands twice")
    return found


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(len(_LFS_POINTER))
        if first == _LFS_POINTER:
            raise ValueError(
                f"model.path must hold readable weights, got a pointer of Git LFS in {file.name}; "
                "fetch the file itself with git lfs pull"
            )
        stream.seek(8)
        length = int.from_bytes(first[:8], "little")
        # A damaged length must not become a buffer of its size.
        text = stream.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text, object_pairs_hook=_once)
        header.pop("__metadata__", None)
        return {
            name: _stored(file, name, entry, 8 + length, size) for name, entry in header.items()
        }
    except _PlainError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, "no header") from error


class _PlainError(ValueError):
    """What is wrong is already said in words of our own."""


def _stored(file: Path, name: str, entry: dict[str, Any], begin: int, size: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    stored = StoredTensor(file, begin + start, _plain_dtype(name, entry["dtype"]), shape)
    if stored.num_bytes != end - start or begin + end > size or start < 0:
        raise _damaged(file, f"{size} bytes")
    return stored


def _plain_dtype(name: str, dtype: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise _PlainError(
            f"model.path must hold tensors of a plain dtype, got {dtype} for {name}; "
            "choose a checkpoint that is not quantized"
        )
    return _DTYPES[dtype]


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


def _damaged(file: Path, got: str) -> _PlainError:
    return _PlainError(
        f"model.path must hold readable weights, got {got} in {file.name}; download them again"
    )
