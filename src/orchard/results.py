"""Metrics with units, and the record of a run on disk.

Metric keys are ``scope/name_unit``: ``round/uplink_bytes``, ``client/train_seconds``,
``personal/rouge_l``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

Metrics: TypeAlias = Mapping[str, float]

_PACKAGES = ("orchard-moe", "torch", "transformers", "peft", "datasets", "numpy", "safetensors")
# Of all that a CPU can do, what decides how fast products are and which kernels torch takes.
_CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "sve", "sve2", "i8mm", "bf16"),  # Arm
)
_CPU_INFO = Path("/proc/cpuinfo")


def write_atomically(path: Path, content: bytes | bytearray, *, mode: int = 0o666) -> None:
    """Replace the file at ``path`` so that a crash leaves the old content or the new, never half.

    Writes beside the target, flushes to disk, renames, and flushes the folder.

    Args:
        path: Of the file.
        content: All of it.
        mode: Who may read and write it, less what the process's mask takes away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)  # that a crash left may have another mode
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


class MetricsLog:
    """The lines of ``metrics.jsonl``: one JSON object per event, each with its round."""

    def __init__(self, path: Path) -> None:
        """Open the log at ``path``, which need not exist yet."""
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the complete lines, one at a time; one cut off by a crash is left out."""
        if not self.path.exists():
            return
        with self.path.open() as file:
            for line in file:
                if line.endswith("\n") and line != "\n":
                    yield json.loads(line)

    def read(self) -> list[dict[str, Any]]:
        """Return the complete lines."""
        return list(self)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line.

        Raises:
            ValueError: A value is NaN or infinite, which JSON cannot hold.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def rewind(self, last_round: int) -> None:
        """Drop the lines after ``last_round``, which a resumed run writes again."""
        kept = (line for line in self if line["round"] <= last_round)
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
        write_atomically(self.path, text.encode())


def metrics_of(line: Mapping[str, Any]) -> dict[str, int | float]:
    """Return what of a line, or of a client's part of one, is a number under a metric's key."""
    return {
        key: value for key, value in line.items() if "/" in key and isinstance(value, int | float)
    }


def environment() -> dict[str, Any]:
    """Describe what a run ran on: versions, source commit, hardware.

    ``commit`` is None outside a checkout, and ends in ``+changes`` where the tree differs from it.
    ``hardware`` names the CPU, and in ``cpu_features`` the instruction sets that decide how fast it
    multiplies; None where the system does not list them.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "commit": _source_commit(),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpu": _processor_name(),
            "cpu_features": _processor_features(),
            "num_cpus": os.cpu_count(),
        },
    }


def _processor_name() -> str:
    return _cpu_info("model name") or platform.processor()


def _processor_features() -> list[str] | None:
    """Return the instruction sets of ``_CPU_FEATURES`` that the CPU has, in that order."""
    listed = _cpu_info("flags", "Features")
    if not listed:
        return None
    flags = set(listed.split())
    return [name for name in _CPU_FEATURES if name in flags]


def _cpu_info(*keys: str) -> str:
    """Return the value of the first line of ``/proc/cpuinfo`` under one of ``keys``; "" = none."""
    if _CPU_INFO.exists():
        for line in _CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.strip()
    return ""


def _source_commit() -> str | None:
    source = Path(__file__).parent
    command = ["git", "-C", str(source)]
    try:
        inside = subprocess.run(
            [*command, "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=False,
        )
        if inside.returncode != 0:
            return None
        commit = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, check=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--", "."],
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit
