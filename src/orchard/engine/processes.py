"""Child processes that end with their parent, and are started again when they end before it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
_STOP_SECONDS, _WATCH_SECONDS = 5.0, 0.5
# What Flower would do over the network by itself.
_OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def child_environment(flower_home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: this Python first, nothing from outside.

    Args:
        flower_home: Where Flower keeps its own files.
    """
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        **_OFFLINE,
        "FLWR_HOME": str(flower_home),
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }


@dataclass
class Child:
    """A process that is kept running.

    Attributes:
        name: For logs.
        command: What is run.
        log_path: Where its output goes, appended.
        environment: Its environment.
        before_restart: Called before it is started again.
        steady_seconds: One that ran this long starts anew without a wait.
        umask: Which rights its files do not have; -1 = as this process' files.
    """

    name: str
    command: Sequence[str]
    log_path: Path
    environment: Mapping[str, str]
    before_restart: Callable[[], None] = lambda: None
    steady_seconds: float = 60.0
    umask: int = -1
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    num_failures: int = field(default=0, init=False)
    num_starts: int = field(default=0, init=False)
    _started_at: float = field(default=0.0, init=False)
    _wait_until: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Start it now."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as output:
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                preexec_fn=_end_with_parent,
                umask=self.umask,
                start_new_session=True,
            )
        self._started_at = time.monotonic()
        self.num_starts += 1

    @property
    def is_running(self) -> bool:
        """Whether it runs now."""
        return self.process is not None and self.process.poll() is None

    def keep_running(self) -> None:
        """Start it again where it has ended, later and later while it ends at once."""
        if self.is_running:
            return
        now = time.monotonic()
        if self.process is not None:
            code, lived = self.process.returncode, now - self._started_at
            _signal_group(self.process.pid, signal.SIGKILL)  # what it started must not outlive it
            self.process = None
            self.num_failures = 0 if lived >= self.steady_seconds else self.num_failures + 1
            wait = min(0.5 * 2**self.num_failures, 30.0) if self.num_failures else 0.0
            log.warning(
                "%s ended with %s after %.0f seconds; starting it again in %.1f seconds (%s)",
                self.name,
                code,
                lived,
                wait,
                self.log_path,
            )
            self._wait_until = now + wait
        if now >= self._wait_until:
            if self.num_starts:
                self.before_restart()
            self.start()

    def stop(self) -> None:
        """End it and what it started, kindly first."""
        if self.process is None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            _signal_group(self.process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
        self.process = None


def _signal_group(group: int, kind: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, kind)


def _end_with_parent() -> None:
    """Let the kernel end this process when its parent does; runs in the child before it starts."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class InUseError(TimeoutError):
    """Another process writes where this one would."""


@contextmanager
def only_one(path: Path, *, seconds: float, what: str) -> Iterator[None]:
    """Hold a lock file, so that two processes never write one folder.

    The system lets go of it whatever ends the process. The file names who holds it.

    Args:
        path: The lock file; its folder is made.
        seconds: How long to wait for another process to end.
        what: What there may be one of, for the message.

    Raises:
        InUseError: Another process still holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    with path.open("a+") as file:
        while not _is_locked(file, fcntl.LOCK_EX, path):
            if time.monotonic() >= end:
                raise InUseError(_in_use(path, what))
            time.sleep(0.2)
        _write_holder(file, f"process {os.getpid()} of {socket.gethostname()}")
        try:
            yield
        finally:
            _write_holder(file, "")


def check_free(path: Path, *, what: str) -> None:
    """Refuse what another process holds, without holding it; a file that is not there is free.

    Raises:
        InUseError: Another process holds it.
    """
    if path.is_file():
        with path.open() as file:
            if not _is_locked(file, fcntl.LOCK_SH, path):
                raise InUseError(_in_use(path, what))


def _is_locked(file: TextIO, kind: int, path: Path) -> bool:
    """Lock an open file, and say whether nobody else has it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        log.warning(
            "the file system of %s has no locks (%s): see to it that no other process writes there",
            path,
            error.strerror,
        )
    return True


def _in_use(path: Path, what: str) -> str:
    holder = path.read_text().strip() or "another process"
    return (
        f"only one {what} may run, got {holder}, which holds {path}; wait until it ends, stop it, "
        "or use another folder"
    )


def _write_holder(file: TextIO, holder: str) -> None:
    file.truncate(0)
    file.write(holder)
    file.flush()


def end_when_free(path: Path) -> None:
    """End this process at once when nobody holds a lock file any more.

    For a process that Flower starts, and that is therefore no child of whoever holds the lock.
    """

    def watch() -> None:
        with path.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(_WATCH_SECONDS)
                    continue
                os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch").start()


@contextmanager
def leaves_on_termination() -> Iterator[None]:
    """Let SIGTERM end what is inside as an interrupt does, so that it cleans up."""

    def leave(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
