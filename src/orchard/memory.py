"""What this process has had in memory, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


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


def release_freed_memory() -> None:
    """Give freed memory back to the system where the C library keeps it (glibc); else nothing.

    glibc keeps what was freed below a block that is still in use, and never needs it again if what
    comes next is larger: after a model of 0.8 GB was loaded as float32 (1.7 GB), 1.0 GB.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
