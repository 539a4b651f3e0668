"""Workers as processes beside this one, kept running until the run ends."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from orchard.engine.processes import Child
from orchard.engine.worker import Header, WorkerError, ask

_LOOK_SECONDS = 0.1
_TURN_SECONDS = 30 * 24 * 3600.0  # a turn may take as long as in one process
_MAX_DEATHS = 3
"""How often a worker may die of one request, or while it starts: of too little memory, say."""


class Beside:
    """A worker that is a child of this process, asked over a local socket."""

    def __init__(self, number: int, child: Child, socket: Path) -> None:
        """Ask the process ``child`` at ``socket``."""
        self._number, self.child, self._socket = number, child, socket

    @property
    def num_restarts(self) -> int:
        """How often another process took its place."""
        return max(self.child.num_starts - 1, 0)

    def ask(self, header: Header, body: bytes) -> tuple[Header, bytes]:
        """Have a request answered, by another process where the first one dies of it."""
        before = self.child.num_starts

        def is_hopeless() -> bool:
            return self.child.num_starts - before > _MAX_DEATHS

        try:
            return ask(
                self._socket,
                header,
                body,
                seconds=_TURN_SECONDS,
                max_deaths=_MAX_DEATHS,
                is_hopeless=is_hopeless,
            )
        except WorkerError as error:
            who = f"worker {self._number}"
            about = f" by {header['client']}'s turn" if "client" in header else ""
            raise ChildProcessError(
                f"{who} must live, got one that was killed or failed{about} {_MAX_DEATHS} times; "
                f"look at {self.child.log_path} and at this machine's memory, or lower --workers"
            ) from error


@contextmanager
def workers_beside(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], *, logs: Path
) -> Iterator[list[Beside]]:
    """Keep a worker running for each environment while the context lasts.

    Args:
        command: What each runs; the path of its socket is added.
        environments: What is added to this process' environment for each.
        logs: Folder for ``worker0.log`` and so on.
    """
    # Paths of sockets are short, and those of runs may not be.
    room = Path(tempfile.mkdtemp(prefix="orchard-"))
    places = []
    for number, own in enumerate(environments):
        socket = room / f"worker{number}"
        child = Child(
            f"worker {number}",
            [*command, str(socket)],
            logs / f"worker{number}.log",
            {**os.environ, **own},
            steady_seconds=0.0,  # one that is killed is replaced at once; ask() gives up in time
        )
        places.append(Beside(number, child, socket))
    end = threading.Event()

    def keep() -> None:
        # A child ends with the thread that started it, so one thread starts them all.
        while not end.is_set():
            for place in places:
                place.child.keep_running()
            end.wait(_LOOK_SECONDS)
        for place in places:
            place.child.stop()

    keeper = threading.Thread(target=keep, name="workers", daemon=True)
    keeper.start()
    try:
        yield places
    finally:
        end.set()
        keeper.join()
        shutil.rmtree(room, ignore_errors=True)
