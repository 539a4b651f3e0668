"""A thread that runs the engine, and answers that grow while it does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from orchard.serving.engine import Engine, Row
from orchard.serving.registry import Registry


@dataclass(frozen=True)
class Job:
    """A row that somebody waits for.

    Attributes:
        make: Makes the row from its model's values, in the engine's thread.
        model: Name of the model.
        tell: Called in the engine's thread after each token, and once with what went wrong.
    """

    model: str
    make: Callable[[Registry], Row]
    tell: Callable[[Row | Exception], None]


@dataclass(eq=False)
class Worker:
    """The engine's thread, with a bounded queue before it.

    Attributes:
        engine: What runs.
        registry: Where models come from.
        max_queue: At most so many jobs wait or run.
    """

    engine: Engine
    registry: Registry
    max_queue: int = 256
    _jobs: list[Job] = field(default_factory=list)
    _rows: dict[int, tuple[Row, Job]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _is_ending: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to run."""
        self._thread = threading.Thread(target=self._run, name="orchard-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish what was taken on, and end."""
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, jobs: list[Job]) -> bool:
        """Take jobs on, all or none; False where the queue is full."""
        with self._changed:
            if len(self._jobs) + len(self._rows) + len(jobs) > self.max_queue:
                return False
            self._jobs += jobs
            self._changed.notify()
        return True

    @property
    def num_waiting_or_running(self) -> int:
        """Jobs that were taken on and have not ended."""
        return len(self._jobs) + len(self._rows)

    def _run(self) -> None:
        with self.engine.running():
            while True:
                with self._changed:
                    while not (self._jobs or self._rows or self._is_ending):
                        self._changed.wait()
                    if not (self._jobs or self._rows):
                        return
                    taken, self._jobs = self._jobs, []
                for job in taken:
                    self._take(job)
                self._step()

    def _take(self, job: Job) -> None:
        try:
            row = job.make(self.registry)
        except Exception as error:  # a damaged file harms its own model alone
            job.tell(error)
            return
        self._rows[id(row)] = (row, job)
        self.engine.submit(row)

    def _step(self) -> None:
        try:
            moved = self.engine.step()
        except Exception as error:  # whoever waits must hear of it, and others be served
            self.engine.abort()
            for _, job in self._rows.values():
                job.tell(error)
            self._rows.clear()
            return
        for row in moved:
            self._rows[id(row)][1].tell(row)
        self._rows = {
            key: own
            for key, own in self._rows.items()
            if not (own[0].finish or own[0].is_cancelled)
        }
