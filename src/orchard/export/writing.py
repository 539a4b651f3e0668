"""Tensors written to safetensors files as they come, and folders written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from orchard.export.merging import Entry
from orchard.results import writing

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SHARD_BYTES = 5 * 10**9  # as Hugging Face's hub advises


def write_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Write one safetensors file, holding one part of one tensor at a time.

    Raises:
        ValueError: A tensor yields another number of bytes than it has.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with writing(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            written = 0
            for part in entry.parts():
                flat = part.detach().cpu().contiguous().flatten().view(torch.uint8)
                file.write(flat.numpy().data)
                written += flat.numel()
            if written != entry.num_bytes:
                raise ValueError(
                    f"{entry.name} must have {entry.num_bytes} bytes, got {written}; "
                    "the base changed while it was read"
                )
        file.flush()
        os.fsync(file.fileno())


def write_shards(folder: Path, entries: Sequence[Entry], *, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a checkpoint as transformers does: one file, or several with an index.

    Returns:
        The bytes of all tensors.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        size = sum(own.num_bytes for own in shards[-1])
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    total = sum(entry.num_bytes for entry in entries)
    if len(shards) == 1:
        write_entries(folder / "model.safetensors", shards[0])
        return total
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {entry.name: name for entry in shard}
        write_entries(folder / name, shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def check_new(out: Path) -> None:
    """Check that a folder is not there yet.

    Raises:
        FileExistsError: It is.
    """
    if out.exists() or out.is_symlink():
        raise FileExistsError(
            f"--out must be a new folder, got {out}, which exists; remove it or name another"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` at the end, or is gone if something fails.

    Raises:
        FileExistsError: ``out`` is there already.
        OSError: There is no space on the disk, or another reason not to write.
    """
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"the disk of --out must have space for the export, got none left at {out}; "
                "free some or name another place",
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
