"""Trackers follow a run: every completed round is read from ``metrics.jsonl`` and sent to each.

A round is sent after its checkpoint, so no tracker has a round that resuming runs again.
``tracking.json`` in the run's folder remembers which round each tracker has; whatever it lacks,
since it failed, was killed or was not asked for, is sent the next time. A tracker that fails is
warned about once and left alone: it neither ends nor changes the run.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from orchard.engine.progress import Reporter
from orchard.evaluation.quality import STDERR
from orchard.recipe.options import Recipe
from orchard.recipe.reading import known_options, option_value
from orchard.results import metrics_of, write_json
from orchard.tracking.trackers import TrackedRun, Tracker

STATE_FILE = "tracking.json"


class Following:
    """A reporter that passes on what it is told, and sends completed rounds to trackers."""

    def __init__(
        self,
        reporter: Reporter,
        trackers: Mapping[str, Tracker],
        *,
        folder: Path,
        recipe: Recipe,
        warn: Callable[[str], None],
    ) -> None:
        """Follow a run.

        Args:
            reporter: Told of everything too.
            trackers: By name.
            folder: The run's folder.
            recipe: What it runs.
            warn: Told, once for each, why a tracker stopped.
        """
        self._reporter, self._folder, self._warn = reporter, folder, warn
        self._trackers = dict(trackers)
        self._parameters = {key: option_value(recipe, key) for key in known_options()}
        self._state: dict[str, Any] = {}
        self._offset, self._waiting = 0, dict[int, list[dict[str, Any]]]()
        self._completed, self._num_rounds = 0, 0

    def begin(self, *, title: str, num_rounds: int, round_number: int) -> None:
        """Open the run with every tracker, and send what completed rounds a tracker lacks."""
        self._reporter.begin(title=title, num_rounds=num_rounds, round_number=round_number)
        self._num_rounds = num_rounds
        self._state = self._read_state()
        for name, tracker in list(self._trackers.items()):
            run = TrackedRun(
                self._state["run"], self._folder, self._parameters, self._last_round(name)
            )
            self._attempt(name, partial(tracker.begin, run))
        self._send(round_number)

    def working(self, what: str, *, share: float) -> None:
        """Pass it on."""
        self._reporter.working(what, share=share)

    def completed(self, round_number: int, *, loss: float | None, uplink_bytes: int) -> None:
        """Send the round to every tracker."""
        self._reporter.completed(round_number, loss=loss, uplink_bytes=uplink_bytes)
        self._send(round_number)

    def end(self) -> None:
        """Close the run with every tracker."""
        self._reporter.end()
        is_finished = self._completed == self._num_rounds
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, partial(tracker.end, is_finished=is_finished))

    def _last_round(self, name: str) -> int | None:
        last: int | None = self._state["last_round"].get(name)
        return last

    def _read_state(self) -> dict[str, Any]:
        """Return the run's name to trackers and what each has, made where there is none."""
        path = self._folder / STATE_FILE
        if path.exists():
            state: dict[str, Any] = json.loads(path.read_text())
            return state
        state = {"run": secrets.token_hex(8), "last_round": {}}
        write_json(path, state)  # before anything is sent: what is sent must be found again
        return state

    def _send(self, completed: int) -> None:
        """Send every round up to a completed one that a tracker lacks."""
        self._completed = completed
        for line in self._new_lines():
            self._waiting.setdefault(line["round"], []).append(line)
        for round_number in sorted(r for r in self._waiting if r <= completed):
            values = round_values(self._waiting.pop(round_number))
            for name, tracker in list(self._trackers.items()):
                last = self._last_round(name)
                if last is not None and last >= round_number:
                    continue
                if self._attempt(name, partial(tracker.log, values, round_number=round_number)):
                    self._state["last_round"][name] = round_number
        write_json(self._folder / STATE_FILE, self._state)

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        """Read what was added to the log since the last time, whole lines only."""
        path = self._folder / "metrics.jsonl"
        if not path.exists():
            return
        with path.open() as file:
            file.seek(self._offset)
            while (text := file.readline()).endswith("\n"):
                self._offset = file.tell()
                yield json.loads(text)

    def _attempt(self, name: str, call: Callable[[], None]) -> bool:
        """Call a tracker and say whether it worked; where not, never call it again."""
        try:
            call()
        except Exception as error:  # whatever a library raises, the run is more important
            del self._trackers[name]
            text = " ".join(f"{type(error).__name__}: {error}".split())
            last = self._last_round(name)
            when = "before any round" if last is None else f"after round {last}"
            self._warn(
                f"tracker {name} stopped {when} ({text}); the run goes on and metrics.jsonl has "
                f"everything; resume it with {name} tracked again to send what it lacks"
            )
            return False
        return True


def round_values(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of one round under the keys that trackers show.

    A round's own keys stay, such as ``round/uplink_bytes``. What is measured of each client stands
    under ``clients/NAME/KEY``, and its mean over clients under the key itself, such as
    ``global/loss``; the mean of a standard error would be none, and is left out.

    Args:
        lines: Of ``metrics.jsonl``, all of the same round.
    """
    values: dict[str, float] = {}
    per_key: dict[str, list[float]] = {}
    for line in lines:
        if line["kind"] == "round":
            values |= metrics_of(line)
            continue
        per_client = line["clients"] if line["kind"] == "evaluation" else {line["client"]: line}
        for client, measured in per_client.items():
            for key, value in metrics_of(measured).items():
                values[f"clients/{client}/{key}"] = value
                per_key.setdefault(key, []).append(value)
    means = {k: fmean(found) for k, found in per_key.items() if not k.endswith(STDERR)}
    return means | values
