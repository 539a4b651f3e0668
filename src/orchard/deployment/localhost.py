"""A federation of real processes on this machine: ``orchard coordinate`` and ``orchard site``.

For tests, measurements and trials before machines are at hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchard.engine.processes import free_port

ORCHARD = str(Path(sys.executable).parent / "orchard")
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start_orchard(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Start the command, its output appended to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [ORCHARD, *arguments], stdout=output, stderr=subprocess.STDOUT, env=_ENVIRONMENT
        )


@dataclass
class Processes:
    """A coordinator and its sites.

    Attributes:
        folder: Everything is below it: keys, stores of sites, logs.
        data: One ``.jsonl`` file of examples for each site, which is called as its file.
        site_options: For every ``orchard site``.
        is_secure: Whether TLS and keys are used.
        port: Where the coordinator listens.
        sites: Name to process, of the sites that were started.
        coordinator: The process of the run that was started last.
    """

    folder: Path
    data: Path
    site_options: Sequence[str] = ()
    is_secure: bool = True
    port: int = field(default_factory=free_port)
    sites: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    coordinator: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        """Make the keys."""
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
        self.sites[name] = start_orchard(
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
        self.coordinator = start_orchard(
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
