"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

# Columns of a screen: below the first a bar has no place, below the second neither elapsed time.
_WIDE, _MIDDLING, _SHORT_TITLE = 110, 80, 14


class Reporter(Protocol):
    """Told of everything that takes time."""

    def begin(self, *, title: str, num_rounds: int, round_number: int) -> None:
        """Show a run that has completed ``round_number`` of its rounds."""

    def working(self, what: str, *, share: float) -> None:
        """Show what is being done, and which share of the round is done, in [0, 1]."""

    def completed(self, round_number: int, *, loss: float | None, uplink_bytes: int) -> None:
        """Show a completed round: its mean training loss, if any, and the bytes clients sent."""

    def end(self) -> None:
        """Stop showing."""


class Silent:
    """Shows nothing."""

    def begin(self, *, title: str, num_rounds: int, round_number: int) -> None:
        """Show nothing."""

    def working(self, what: str, *, share: float) -> None:
        """Show nothing."""

    def completed(self, round_number: int, *, loss: float | None, uplink_bytes: int) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""


class Lines:
    """One plain line per round, for logs."""

    def __init__(self, console: Console) -> None:
        """Write to ``console``."""
        self._console, self._title, self._num_rounds = console, "", 0

    def begin(self, *, title: str, num_rounds: int, round_number: int) -> None:
        """Say what starts, and where."""
        self._title, self._num_rounds = title, num_rounds
        resumed = f", resuming after round {round_number}" if round_number else ""
        self._write(f"{title}: {num_rounds} rounds{resumed}")

    def working(self, what: str, *, share: float) -> None:
        """Say nothing: a line per round is enough."""

    def completed(self, round_number: int, *, loss: float | None, uplink_bytes: int) -> None:
        """Write the round's line."""
        self._write(
            f"{self._title}: round {round_number}/{self._num_rounds} {format_loss(loss)} "
            f"uplink {format_bytes(uplink_bytes)}"
        )

    def end(self) -> None:
        """Say nothing more."""

    def _write(self, line: str) -> None:
        # As it is: no wrapping at the width of a screen, no markup in a title.
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Bar:
    """A progress bar with round, loss, bytes and time left."""

    def __init__(self, console: Console) -> None:
        """Draw on ``console``; on a narrow one without what can be missed."""
        is_wide, is_middling = console.width >= _WIDE, console.width >= _MIDDLING
        # A terminal that knows ASCII alone has no dots to spin.
        spinner = SpinnerColumn("dots" if console.encoding.startswith("utf") else "line")
        title = Column(no_wrap=True, max_width=console.width if is_wide else _SHORT_TITLE)
        self._progress = Progress(
            spinner,
            TextColumn("[bold]{task.fields[title]}", table_column=title),
            *((BarColumn(bar_width=24),) if is_wide else ()),
            TextColumn("round {task.fields[round]}"),
            TextColumn("[dim]{task.fields[numbers]}"),
            *((TimeElapsedColumn(), TextColumn("left")) if is_middling else ()),
            TimeRemainingColumn(),
            *((TextColumn("[dim]{task.fields[what]}"),) if is_wide else ()),
            console=console,
        )
        self._task: TaskID | None = None
        self._round, self._num_rounds, self._total_bytes = 0, 0, 0

    def begin(self, *, title: str, num_rounds: int, round_number: int) -> None:
        """Draw the bar."""
        self._round, self._num_rounds = round_number, num_rounds
        self._task = self._progress.add_task(
            title,
            total=num_rounds,
            completed=round_number,
            title=title,
            round=f"{round_number}/{num_rounds}",
            numbers="",
            what="",
        )
        self._progress.start()

    def working(self, what: str, *, share: float) -> None:
        """Move the bar by a part of a round."""
        assert self._task is not None
        self._progress.update(self._task, completed=self._round + share, what=what)

    def completed(self, round_number: int, *, loss: float | None, uplink_bytes: int) -> None:
        """Move the bar to the end of the round."""
        assert self._task is not None
        self._round = round_number
        self._total_bytes += uplink_bytes
        self._progress.update(
            self._task,
            completed=round_number,
            round=f"{round_number}/{self._num_rounds}",
            numbers=f"{format_loss(loss)} · up {format_bytes(self._total_bytes)}",
            what="",
        )

    def end(self) -> None:
        """Leave the last state on the screen."""
        if self._task is not None:
            self._progress.update(self._task, what="")
        self._progress.stop()


def make_console() -> Console:
    """Return a console as wide as the terminal, or wide enough for tables where there is none."""
    console = Console()
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=140)


def choose_reporter(console: Console) -> Reporter:
    """Return a bar for a terminal and plain lines for anything else."""
    return Bar(console) if console.is_terminal else Lines(console)


def format_loss(loss: float | None) -> str:
    """Return a round's training loss, or that there is none."""
    return "nobody trained" if loss is None else f"loss {loss:.3f}"


def format_bytes(count: float) -> str:
    """Return bytes with a decimal unit: 1.2 MB is 1,200,000 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
