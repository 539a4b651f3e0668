"""Experts of a checkpoint once more on disk, fused and in the dtype of training, to be mapped.

A published checkpoint has a tensor for each expert and projection, at places where no register is
aligned; a model has one parameter of all experts of a layer. The cache holds that parameter's bytes
as they would be in memory, each at the beginning of a page, so that it is mapped and used as it is.
It is made once, expert by expert, and shared by all processes of the machine.

The layout is that of a safetensors file: the length of a header, the header in JSON, the bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchard.models.stored.conversion import StoredExperts, StoredModel
from orchard.models.stored.finiteness import check_finite
from orchard.models.stored.precision import encode, parts_of
from orchard.models.stored.tensors import StoredTensor

FOLDER = ".orchard"
_PAGE = 4096
_FORMAT = "orchard-experts-1"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
_GAP = "__gap."
_OPTION = "model.expert_cache"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ExpertCache:
    """The experts of one checkpoint in one dtype, on disk.

    Attributes:
        file: Where they are.
        parts: The model's name of each fused parameter to the places of its parts, see
            ``parts_of``; of all experts, which come first.
    """

    file: Path
    parts: Mapping[str, Mapping[str, StoredTensor]]


def open_cache(
    stored: StoredModel,
    dtypes: Mapping[str, torch.dtype],
    *,
    precision: str = "bf16",
    folder: str = "",
) -> ExpertCache:
    """Return the cache of a checkpoint's experts; make it where there is none.

    Processes that ask at once wait for the one that makes it. It is written under another name and
    renamed when all of it is on disk, so that what has the name is whole.

    Args:
        stored: The checkpoint.
        dtypes: Fused parameters to the dtype that the model has them in.
        precision: What they are kept in, of ``PRECISIONS``.
        folder: Where; "" = beside the checkpoint.

    Raises:
        ValueError: There is no space for it, or it cannot be written; or what is there is damaged,
            or of another checkpoint; or an expert is not finite.
    """
    place = Path(folder).expanduser() if folder else Path(stored.source) / FOLDER
    names = sorted({_DTYPES[dtype].lower() for dtype in dtypes.values()})
    names += [precision] if precision != "bf16" else []
    file = place / f"experts-{'-'.join(names)}.cache"
    layout = _lay_out(stored, dtypes, precision)
    digest = checkpoint_digest(stored)
    if not file.exists():
        with _writing(place), _locked(place):
            if not file.exists():
                _check_space(place, layout, path=stored.source)
                _write(file, stored, dtypes, precision, layout, digest=digest)
    places = _read(file, layout, digest=digest, path=stored.source)
    parts = {
        name: {part: places[_key(name, part)] for part in _parts(experts, dtypes[name], precision)}
        for name, experts in stored.experts.items()
    }
    return ExpertCache(file, parts)


def checkpoint_digest(stored: StoredModel) -> str:
    """Return what changes when a checkpoint's files do: names, sizes, times and headers."""
    sha = hashlib.sha256()
    for file in sorted({tensor.file for tensor in stored.checkpoint.tensors.values()}):
        about = file.stat()
        sha.update(f"{file.name}|{about.st_size}|{about.st_mtime_ns}|".encode())
    for name, tensor in sorted(stored.checkpoint.tensors.items()):
        sha.update(f"{name}|{tensor.file.name}|{tensor.start}|{tensor.shape}|".encode())
    return sha.hexdigest()


def _parts(
    experts: StoredExperts, dtype: torch.dtype, precision: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return parts_of(precision, experts.shape[1:], dtype)


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def _lay_out(
    stored: StoredModel, dtypes: Mapping[str, torch.dtype], precision: str
) -> dict[str, dict[str, Any]]:
    """Return a header's entries: every part at a page, what is between them a tensor, too."""
    layout: dict[str, dict[str, Any]] = {}
    end = 0
    for name, experts in stored.experts.items():
        for part, (shape, dtype) in _parts(experts, dtypes[name], precision).items():
            if gap := -end % _PAGE:
                layout[f"{_GAP}{len(layout)}"] = _entry("U8", (gap,), end, end + gap)
                end += gap
            whole = (experts.shape[0], *shape)
            num_bytes = dtype.itemsize * torch.Size(whole).numel()
            layout[_key(name, part)] = _entry(_DTYPES[dtype], whole, end, end + num_bytes)
            end += num_bytes
    return layout


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _header(layout: Mapping[str, Any], digest: str) -> bytes:
    about = {"__metadata__": {"format": _FORMAT, "checkpoint": digest}, **layout}
    text = json.dumps(about).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _size(layout: Mapping[str, Any]) -> int:
    return max((int(own["data_offsets"][1]) for own in layout.values()), default=0)


def _check_space(place: Path, layout: Mapping[str, Any], *, path: str) -> None:
    needed, free = _size(layout), shutil.disk_usage(place).free
    if needed > free:
        raise _no_space(place, needed, f"{_show(free)} free", path=path)


def _no_space(place: Path, needed: int, got: str, *, path: str) -> ValueError:
    return ValueError(
        f"{_OPTION} must be a folder with {_show(needed)} free for the experts of {path}, got "
        f"{got} in {place}; name another folder, or none to read experts where they lie"
    )


def _show(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Make a folder, and say in one line where it cannot be written."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(
            f"{_OPTION} must be a folder that can be written, got {place} "
            f"({error.strerror or error}); name another folder, or none to read experts where "
            "they lie"
        ) from error


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Wait until no other process writes to a folder; the system unlocks for one that dies."""
    with (place / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _write(
    file: Path,
    stored: StoredModel,
    dtypes: Mapping[str, torch.dtype],
    precision: str,
    layout: Mapping[str, Any],
    *,
    digest: str,
) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(_header(layout, digest))
            begin = stream.tell()
            stream.truncate(begin + _size(layout))
            for name, experts in stored.experts.items():
                for expert in range(experts.shape[0]):
                    values = read_slice(stored, experts, expert, dtypes[name])
                    for part, tensor in encode(precision, values).items():
                        num_bytes = tensor.numel() * tensor.itemsize
                        start = layout[_key(name, part)]["data_offsets"][0]
                        stream.seek(begin + start + expert * num_bytes)
                        stream.write(bytes_of(tensor))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
        _sync(file.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise _no_space(
                file.parent, _size(layout), error.strerror or "none", path=stored.source
            ) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def read_slice(
    stored: StoredModel, experts: StoredExperts, expert: int, dtype: torch.dtype
) -> Tensor:
    """Read one expert's slice into memory of its own, in the model's layout and dtype.

    Raises:
        ValueError: It is not finite.
    """
    values = experts.read(stored.checkpoint, expert).to(dtype).contiguous()
    check_finite([(experts.name, values)], path=stored.source)
    return values


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's bytes, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _sync(folder: Path) -> None:
    """Let the name of a file reach the disk, as its bytes have."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(
    file: Path, layout: Mapping[str, Any], *, digest: str, path: str
) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        is_of_it = (metadata["format"], metadata["checkpoint"]) == (_FORMAT, digest)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(file, "no header") from None
    if not is_of_it or header != layout:
        raise ValueError(
            f"{file} must be made of {path} as it is now, got the experts of another checkpoint; "
            f"delete it, and it is made anew, or name another folder with {_OPTION}"
        )
    begin = 8 + length
    if size != begin + _size(layout):
        raise _damaged(file, f"{size} of {begin + _size(layout)} bytes")
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    return {
        name: StoredTensor(
            file, begin + own["data_offsets"][0], dtypes[own["dtype"]], tuple(own["shape"])
        )
        for name, own in layout.items()
        if not name.startswith(_GAP)
    }


def _damaged(file: Path, got: str) -> ValueError:
    return ValueError(f"{file} must be whole, got {got}; delete it, and it is made anew")
