"""Tensors that are mapped from files, read-only: what the system may drop, and read again.

Pages of a mapped file are no memory of a process's own. All processes that map the file share them,
and where memory is short the system takes them back without writing anything.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from orchard.models.stored.tensors import StoredTensor


def map_file(file: Path) -> mmap.mmap:
    """Map a whole file, read-only.

    A mapping that may be written, even one whose writes reach no file, counts as memory that is
    promised, and one that is larger than the machine is refused.
    """
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def map_tensors(tensors: Iterable[StoredTensor]) -> list[Tensor]:
    """Return tensors as they lie in their files, each file mapped once.

    Args:
        tensors: Where they lie; each begins at a multiple of its dtype's size.
    """
    mappings: dict[Path, mmap.mmap] = {}
    found = []
    with warnings.catch_warnings():
        # Nothing writes to them: they are frozen.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        for stored in tensors:
            if stored.file not in mappings:
                mappings[stored.file] = map_file(stored.file)
            flat = torch.frombuffer(
                mappings[stored.file],
                dtype=stored.dtype,
                count=stored.num_bytes // stored.dtype.itemsize,
                offset=stored.start,
            )
            found.append(flat.view(stored.shape))
    return found
