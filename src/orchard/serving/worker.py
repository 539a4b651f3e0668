"""A thread that runs the engine, and answers that grow while it does."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchard.serving.engine import Engine, Row
from orchard.serving.registry import Registry
from orchard.serving.values import RowValues


@dataclass(eq=False)
class Job:
    """A row that somebody waits for.

    Attributes:
        model: Name of the model.
        make: Makes the row from its model's values, in the engine's thread.
        tell: Called in the engine's thread after each token, and once with what went wrong.
        row: What was made.
    """

    model: str
    make: Callable[[RowValues], Row]
    tell: Callable[[Row | Exception], None]
    row: Row | None = None
    _is_cancelled: bool = False

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits any more."""
        return self._is_cancelled or (self.row is not None and self.row.is_cancelled)

    def cancel(self) -> None:
        """Say that nobody waits any more, whether it waits or runs."""
        self._is_cancelled = True
        if self.row is not None:
            self.row.is_cancelled = True


@dataclass(eq=False)
class Worker:
    """The engine's thread, with a bounded queue before it.

    A job is taken on when there is room for its row, and for its model among those in memory; who
    comes first is taken first.

    Attributes:
        engine: What runs.
        registry: Where models come from.
        max_queue: At most so many jobs wait or run.
        num_tokens: Written since the start.
    """

    engine: Engine
    registry: Registry
    max_queue: int = 256
    num_tokens: int = 0
    _jobs: deque[Job] = field(default_factory=deque)
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

    def submit(self, jobs: Sequence[Job]) -> bool:
        """Take jobs on, all or none; False where the queue is full."""
        with self._changed:
            if len(self._jobs) + len(self._rows) + len(jobs) > self.max_queue:
                return False
            self._jobs += jobs
            self._changed.notify()
        return True

    @property
    def num_waiting(self) -> int:
        """Jobs that were taken on and have no row yet."""
        return len(self._jobs)

    @property
    def num_running(self) -> int:
        """Jobs whose rows are written."""
        return len(self._rows)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        with self.engine.running():
            while True:
                with self._changed:
                    while not (self._jobs or self._rows or self._is_ending):
                        self._changed.wait()
                    if not (self._jobs or self._rows):
                        return
                while (job := self._next()) is not None:
                    self._take(job)
                self._step()

    def _next(self) -> Job | None:
        """Return the first job that waits, where there is room for it."""
        with self._changed:
            if any(job.is_cancelled for job in self._jobs):
                self._jobs = deque(job for job in self._jobs if not job.is_cancelled)
            if not self._jobs or len(self._rows) >= self.engine.max_rows:
                return None
            used = {job.model for _, job in self._rows.values()}
            if not self.registry.has_room(used | {self._jobs[0].model}):
                return None
            return self._jobs.popleft()

    def _take(self, job: Job) -> None:
        used = {own.model for _, own in self._rows.values()}
        try:
            job.row = row = job.make(self.registry.values(job.model, keep=used))
        except Exception as error:  # a damaged file harms its own model alone
            _tell(job, error)
            return
        row.is_cancelled = job.is_cancelled
        self._rows[id(row)] = (row, job)
        self.engine.submit(row)

    def _step(self) -> None:
        try:
            moved = self.engine.step()
        except Exception as error:  # whoever waits must hear of it, and others be served
            self.engine.abort()
            for _, job in self._rows.values():
                _tell(job, error)
            self._rows.clear()
            return
        for row in moved:
            self.num_tokens += 1
            _tell(self._rows[id(row)][1], row.failure or row)
        self._rows = {
            key: own
            for key, own in self._rows.items()
            if not (own[0].finish or own[0].is_cancelled)
        }


def _tell(job: Job, what: Row | Exception) -> None:
    try:
        job.tell(what)
    except RuntimeError:  # the loop that waited is closed
        job.cancel()
