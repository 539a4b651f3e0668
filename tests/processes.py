"""A federation of real processes on this machine: orchard coordinate and orchard site."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from orchard.engine.processes import free_port
from orchard.server.checkpoint import load_checkpoint

ORCHARD = str(Path(sys.executable).parent / "orchard")
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def orchard(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start the command, its output appended to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [ORCHARD, *arguments], stdout=output, stderr=subprocess.STDOUT, env=_ENVIRONMENT
        )


def kill(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    """Send SIGKILL; what is our own child is waited for."""
    process.send_signal(signal.SIGKILL)
    if isinstance(process, subprocess.Popen):
        process.wait(10)


@dataclass
class Processes:
    """A coordinator and its sites.

    Attributes:
        folder: Everything is below it.
        data: One file of examples for each site.
        site_options: For every ``orchard site``.
        keys: Made here where ``is_secure``.
        is_secure: Whether TLS and keys are used.
    """

    folder: Path
    data: Path
    site_options: Sequence[str] = ()
    is_secure: bool = True
    port: int = field(default_factory=free_port)
    sites: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    coordinator: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = sorted(path.stem for path in self.data.glob("*.jsonl"))
        self.keys = self.folder / "keys"
        if self.is_secure:
            named = [part for name in self.names for part in ("--site", name)]
            command = [ORCHARD, "keys", str(self.keys), "--host", "127.0.0.1", *named]
            subprocess.run(command, check=True, capture_output=True)
        self._security = ["--keys", str(self.keys)] if self.is_secure else []

    def start_site(self, name: str) -> None:
        """Start a site, or start it again."""
        self.sites[name] = orchard(
            "site",
            "--data",
            str(self.data / f"{name}.jsonl"),
            "--store",
            str(self.store(name)),
            "--superlink",
            f"127.0.0.1:{self.port}",
            *self._security,
            *self.site_options,
            log=self.folder / f"{name}.log",
        )

    def store(self, name: str) -> Path:
        """Return a site's folder."""
        return self.folder / "stores" / name

    def start_coordinator(
        self, recipe: Path, overrides: Sequence[str], *, run: Path, resume: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start the coordinator of a run."""
        self.coordinator = orchard(
            "coordinate",
            str(recipe),
            *overrides,
            "--address",
            f"127.0.0.1:{self.port}",
            "--out",
            str(run),
            *self._security,
            *(["--resume"] if resume else []),
            log=self.folder / "coordinator.log",
        )
        return self.coordinator

    def stop(self) -> None:
        """End all of it."""
        everything = [*self.sites.values(), *([self.coordinator] if self.coordinator else [])]
        for process in everything:
            process.terminate()
        for process in everything:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def tail(self) -> str:
        """Return the ends of all logs, for a failed assertion."""
        logs = [*self.folder.glob("*.log"), *self.folder.rglob("logs/*.log")]
        return "\n".join(
            f"== {path.relative_to(self.folder)}\n"
            + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(logs)
        )


@contextmanager
def running(processes: Processes) -> Iterator[Processes]:
    """Have all sites running inside."""
    for name in processes.names:
        processes.start_site(name)
    try:
        yield processes
    finally:
        processes.stop()


def wait_for(is_true: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: It does not in time.
    """
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"{what} within {seconds} seconds"
        time.sleep(0.1)


def shared_tensors(run: Path) -> Mapping[str, torch.Tensor]:
    """Return the global tree of a run's last checkpoint."""
    state = load_checkpoint(run / "checkpoints", about={})
    assert state is not None
    return state.shared


def result(run: Path) -> dict[str, Any]:
    """Return the content of a run's ``result.json``."""
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found
