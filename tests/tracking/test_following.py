"""Every tracker gets each completed round once, whatever fails, is killed or begins late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchard.engine.progress import Silent
from orchard.recipe.options import Recipe
from orchard.results import MetricsLog
from orchard.tracking.following import Following, round_values
from orchard.tracking.trackers import TRACKERS, TrackedRun, Tracker, make_trackers


class Notebook:
    """Keeps what it is told, and fails where it is asked to."""

    def __init__(self, *, fails_at: Sequence[str | int] = ()) -> None:
        self.fails_at = fails_at
        self.runs: list[TrackedRun] = []
        self.rounds: dict[int, dict[str, float]] = {}
        self.ends: list[bool] = []

    def begin(self, run: TrackedRun) -> None:
        self.runs.append(run)
        self._fail("begin")

    def log(self, values: Mapping[str, float], *, round_number: int) -> None:
        self._fail(round_number)
        assert round_number not in self.rounds
        assert all(round_number > earlier for earlier in self.rounds)
        self.rounds[round_number] = dict(values)

    def end(self, *, is_finished: bool) -> None:
        self.ends.append(is_finished)
        self._fail("end")

    def _fail(self, when: str | int) -> None:
        if when in self.fails_at:
            raise RuntimeError("no space")


def drive(
    folder: Path, trackers: Mapping[str, Tracker], *, start: int, stop: int, is_cut: bool = False
) -> list[str]:
    """Play the engine from the checkpoint of round ``start`` to that of ``stop``, of 4 rounds.

    Where it is cut, the round after ``stop`` has lines but no checkpoint. Returns the warnings.
    """
    warnings: list[str] = []
    log = MetricsLog(folder / "metrics.jsonl")
    log.rewind(start)
    follower = Following(Silent(), trackers, folder=folder, recipe=Recipe(), warn=warnings.append)
    follower.begin(title="t", num_rounds=4, round_number=start)
    if not start:
        log.append(evaluation(0, {"base/loss": 3.0}))
    for number in range(start + 1, stop + 1 + is_cut):
        log.append({"kind": "client", "round": number, "client": "a", "client/train_loss": 1.0})
        if number <= stop:
            log.append({"kind": "round", "round": number, "round/uplink_bytes": 10 * number})
            follower.completed(number, loss=1.0, uplink_bytes=10)
    follower.end()
    return warnings


def evaluation(number: int, values: Mapping[str, float]) -> dict[str, Any]:
    return {"kind": "evaluation", "round": number, "seconds": 1.0, "clients": {"a": dict(values)}}


def test_keys_are_those_of_the_log_with_means_over_clients() -> None:
    found = round_values(
        [
            {"kind": "client", "round": 1, "client": "a b", "client/train_loss": 1.0},
            {"kind": "client", "round": 1, "client": "c", "client/train_loss": 3.0},
            {
                "kind": "evaluation",
                "round": 1,
                "seconds": 9.0,
                "clients": {
                    "a b": {"global/accuracy": 0.5, "global/accuracy_stderr": 0.1},
                    "c": {"global/accuracy": 1.0, "global/accuracy_stderr": 0.3},
                },
            },
            {"kind": "round", "round": 1, "round/uplink_bytes": 7, "rounds_since_sent": {"0": [1]}},
        ]
    )
    assert found == {
        "client/train_loss": 2.0,
        "clients/a b/client/train_loss": 1.0,
        "clients/c/client/train_loss": 3.0,
        "global/accuracy": 0.75,
        "clients/a b/global/accuracy": 0.5,
        "clients/c/global/accuracy": 1.0,
        "clients/a b/global/accuracy_stderr": 0.1,
        "clients/c/global/accuracy_stderr": 0.3,
        "round/uplink_bytes": 7,
    }


def test_a_round_without_a_checkpoint_is_sent_when_it_has_one(tmp_path: Path) -> None:
    first, second = Notebook(), Notebook()
    drive(tmp_path, {"tensorboard": first}, start=0, stop=2, is_cut=True)
    assert list(first.rounds) == [0, 1, 2]
    drive(tmp_path, {"tensorboard": second}, start=2, stop=4)
    assert list(second.rounds) == [3, 4]
    assert (first.ends, second.ends) == ([False], [True])
    assert [run.last_round for run in (*first.runs, *second.runs)] == [None, 2]
    assert first.runs[0].run_id == second.runs[0].run_id


def test_a_tracker_that_comes_late_gets_the_rounds_before(tmp_path: Path) -> None:
    early, late = Notebook(), Notebook()
    drive(tmp_path, {"tensorboard": early}, start=0, stop=2)
    drive(tmp_path, {"tensorboard": early, "mlflow": late}, start=2, stop=4)
    assert list(early.rounds) == [0, 1, 2, 3, 4]
    assert late.rounds == early.rounds


def test_a_round_whose_checkpoint_was_lost_is_not_sent_again(tmp_path: Path) -> None:
    notebook = Notebook()
    drive(tmp_path, {"wandb": notebook}, start=0, stop=3)
    drive(tmp_path, {"wandb": notebook}, start=1, stop=4)
    assert list(notebook.rounds) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("when", "has_rounds"), [("begin", []), (0, []), (2, [0, 1]), ("end", [0, 1, 2, 3, 4])]
)
def test_a_tracker_that_fails_is_warned_about_once_and_gets_the_rest_the_next_time(
    when: str | int, has_rounds: list[int], tmp_path: Path
) -> None:
    broken, sound = Notebook(fails_at=[when]), Notebook()
    warnings = drive(tmp_path, {"trackio": broken, "mlflow": sound}, start=0, stop=4)
    assert list(sound.rounds) == [0, 1, 2, 3, 4]
    assert sound.ends == [True]
    assert list(broken.rounds) == has_rounds
    assert len(warnings) == 1
    assert warnings[0].startswith("tracker trackio stopped ")
    assert "RuntimeError: no space" in warnings[0]
    broken.fails_at = ()
    assert drive(tmp_path, {"trackio": broken}, start=4, stop=4) == []
    assert list(broken.rounds) == [0, 1, 2, 3, 4]


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ValueError, match=r"track must be of tensorboard, .*did you mean mlflow"):
        make_trackers(["mflow"])


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_told_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"must be installed.*with its extra {name},"):
        make_trackers([name])
