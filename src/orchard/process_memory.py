"""What this process has had in memory, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # of malloc.h
_MADV_PAGEOUT = 21  # of linux/mman.h; unlike MADV_DONTNEED it keeps what was written
_RELEASE_SECONDS = 0.1
_SAMPLE_SECONDS = 0.02
_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/maps")
_ROLLUP, _MEMINFO = Path("/proc/self/smaps_rollup"), Path("/proc/meminfo")
_GROUP, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far.

    On Linux not ``ru_maxrss``, which begins with the peak of whoever started the process.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Return the resident size of this process now; where the system does not say, its peak."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
    return peak_memory_bytes()


def anonymous_memory_bytes(status: Path = _STATUS) -> int:
    """Return what a process has in memory that is no page of a file; Linux only.

    Args:
        status: What the system says of the process.

    Raises:
        OSError: There is no such file, or the process ended.
    """
    for line in status.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no line of anonymous memory in {status}")


@contextmanager
def anonymous_peak() -> Iterator[Callable[[], int]]:
    """Sample this process's anonymous memory while the context lasts, from a thread.

    Yields:
        What returns the largest that was seen so far.
    """
    seen = [anonymous_memory_bytes()]
    end = threading.Event()

    def sample() -> None:
        while not end.wait(_SAMPLE_SECONDS):
            seen[0] = max(seen[0], anonymous_memory_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: seen[0]
    finally:
        end.set()
        thread.join()


def shared_memory_bytes() -> int:
    """Return what this process has now, with its part of pages that it has with others.

    Of several processes that map one file the sum is what they have together (PSS). Where the
    system does not say, the resident size.
    """
    if _ROLLUP.exists():
        for line in _ROLLUP.read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return resident_memory_bytes()


def available_memory_bytes() -> int | None:
    """Return what this process may still have: of the machine, and of its control groups.

    None where the system does not say.
    """
    found = _of_machine("MemAvailable:")
    for group in _groups():
        found += [max(limit - used, 0) for limit in group.limit for used in group.used]
    return min(found, default=None)


def machine_memory_bytes() -> int | None:
    """Return what this machine has, or one of this process's control groups where that is less.

    None where the system does not say.
    """
    limits = [limit for group in _groups() for limit in group.limit]
    return min([*_of_machine("MemTotal:"), *limits], default=None)


def _of_machine(field: str) -> list[int]:
    """Return the bytes of a field of the machine, where the system has it."""
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else []
    return [1024 * int(line.split()[1]) for line in lines if line.startswith(field)]


@dataclass(frozen=True)
class _Group:
    """A control group's limit and what is used of it, without pages of files; empty = unsaid."""

    limit: list[int]
    used: list[int]


def _groups() -> list[_Group]:
    """Return the control groups of this process that limit memory, of both versions.

    The one that the process is in and those around it. In a container the root is the container's
    own, and the path that the system names may not be there.
    """
    found = []
    lines = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for root, controllers, limit, used, prefix in (
        (_GROUP, "", "memory.max", "memory.current", ""),
        (_GROUP / "memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        inner = root / paths.get(controllers, "/").lstrip("/")
        for folder in {root, inner, *(above for above in inner.parents if root in above.parents)}:
            limits = _numbers(folder / limit)
            names = (f"{prefix}inactive_file", f"{prefix}active_file")
            files = sum(_listed(folder / "memory.stat", names))
            found.append(_Group(limits, [number - files for number in _numbers(folder / used)]))
    return found


def _numbers(file: Path) -> list[int]:
    """Return the number that a file consists of, where it is there and is one."""
    text = file.read_text().strip() if file.exists() else ""
    return [int(text)] if text.isdigit() else []


def _listed(file: Path, names: tuple[str, ...]) -> list[int]:
    """Return the values of a file's lines of a name and a number."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [int(line.split()[1]) for line in lines if line.split()[0] in names]


def forget_peak_memory() -> None:
    """Let ``peak_memory_bytes`` begin anew from what is resident now; on Linux only.

    Raises:
        OSError: The system does not let a process do that.
    """
    Path("/proc/self/clear_refs").write_text("5")


def return_memory_at_once() -> None:
    """Let glibc give every freed block of 1 MiB or more back to the system; else nothing.

    For a process with little memory. Left alone, glibc keeps such blocks for the next ones, up to
    32 MiB each, and what fits badly adds up: training adapters of a model of 9 million parameters
    took 0.77 GB instead of 1.19, and 25 % more CPU time.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def loading_to_stay() -> Iterator[None]:
    """Load what a process keeps to its end, and let Python's garbage collector pass over it.

    For a command, not for a library: what is garbage at the end of the context stays too. Without
    it the collector goes through all that torch and transformers are, 0.15 s each time: again and
    again while they are imported (0.7 s of 4.7), and then as often as objects come and go (every
    seventh update of 2,400 tensors, a third of the time of adding them up).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


def release_freed_memory() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc); else nothing.

    glibc keeps what was freed below a block that is still in use, and never needs it again if what
    comes next is larger: after a model of 0.8 GB was loaded as float32 (1.7 GB), 1.0 GB.
    """
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


@contextmanager
def mappings_released(suffix: str) -> Iterator[None]:
    """Let the system have back what is read of mapped files, while they are read.

    A checkpoint is mapped, and what was read of it counts as this process's memory until somebody
    else needs it: a model that is stacked from it would be there twice. Elsewhere than on Linux,
    nothing. What a mapping was changed to stays.

    Args:
        suffix: Of the files' names, such as ``.safetensors``.
    """
    if not _MAPS.exists():
        yield
        return
    end = threading.Event()

    def release_again_and_again() -> None:
        while not end.wait(_RELEASE_SECONDS):
            _release_mappings(suffix)

    thread = threading.Thread(target=release_again_and_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        _release_mappings(suffix)


def _release_mappings(suffix: str) -> None:
    libc = _libc()
    if libc is None or not hasattr(libc, "madvise"):
        return
    for line in _MAPS.read_text().splitlines():
        if line.endswith(suffix):
            start, stop = (int(part, 16) for part in line.partition(" ")[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_PAGEOUT)
