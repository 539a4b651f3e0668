"""What trackers have is what ``metrics.jsonl`` has, read back by each library's own reader."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import orchard
from orchard.recipe.reading import format_value, known_options, option_value
from orchard.results import MetricsLog
from orchard.tracking.following import round_values
from orchard.tracking.trackers import (
    MLflow,
    TensorBoard,
    TrackedRun,
    Tracker,
    Trackio,
    WeightsAndBiases,
)

pytest.importorskip("tensorboard")
pytest.importorskip("mlflow")

Points = dict[str, list[tuple[int, float]]]
Reader = Callable[[Path], Points]
RECIPE = Path(__file__).parent.parent.parent / "recipes" / "tiny" / "fedavg.toml"
FIRST = {"global/loss": 2.0, "clients/Łódź: a=b/global/loss": 1.5}
PARAMETERS: dict[str, str | int | float | bool] = {"seed": 0, "model.device": "", "client.lr": 0.1}


def read_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    read.Reload()
    return {
        tag: [(point.step, point.value) for point in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def read_mlflow(folder: Path) -> Points:
    del folder  # MLFLOW_TRACKING_URI says where
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    run = only_mlflow_run()
    return {
        key: sorted(
            (point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)
        )
        for key in run.data.metrics
    }


def only_mlflow_run() -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("orchard")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.fixture(params=["files", pytest.param("sqlite", marks=pytest.mark.long)])
def mlflow_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    is_sqlite = request.param == "sqlite"
    uri = f"sqlite:///{tmp_path}/mlflow.db" if is_sqlite else f"file:{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    return iter(())


def told(folder: Path, *, last_round: int | None) -> TrackedRun:
    return TrackedRun("0123456789abcdef", folder, PARAMETERS, last_round)


def check_once(make: Callable[[], Tracker], reader: Reader, folder: Path) -> None:
    """Check that rounds sent twice around a crash are there once, in one run."""
    before = make()
    before.begin(told(folder, last_round=None))
    before.log(FIRST, round_number=0)
    before.log({"round/uplink_bytes": 10.0, "global/loss": 1.0}, round_number=1)
    # Killed here: nothing was closed, and round 1 is not known to have been sent.
    after = make()
    after.begin(told(folder, last_round=0))
    after.log({"round/uplink_bytes": 10.0, "global/loss": 1.0}, round_number=1)
    after.log({"round/uplink_bytes": 20.0}, round_number=2)
    after.end(is_finished=True)
    points = reader(folder)
    assert points["global/loss"] == [(0, 2.0), (1, 1.0)]
    assert points["round/uplink_bytes"] == [(1, 10.0), (2, 20.0)]
    assert [points[key] for key in points if key.startswith("clients/")] == [[(0, 1.5)]]


def test_tensorboard_has_each_round_once_after_a_crash(tmp_path: Path) -> None:
    check_once(TensorBoard, read_tensorboard, tmp_path)


@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_has_each_round_once_after_a_crash_in_one_run(tmp_path: Path) -> None:
    check_once(MLflow, read_mlflow, tmp_path)
    run = only_mlflow_run()
    assert run.info.run_name == tmp_path.name
    assert run.info.status == "FINISHED"
    assert run.data.params == {key: format_value(value) for key, value in PARAMETERS.items()}


@pytest.mark.parametrize("mlflow_store", ["files"], indirect=True)
@pytest.mark.usefixtures("mlflow_store")
def test_a_run_is_the_same_with_trackers_and_they_have_what_its_log_has(tmp_path: Path) -> None:
    recipe = orchard.load_recipe(
        RECIPE,
        client={"steps": 1, "batch_size": 2},
        server={"rounds": 2},
        evaluation={"models": "base,global", "metrics": "loss", "retention_path": "", "every": 1}
        | {"max_examples": 1},
    )
    plain = orchard.run(recipe, out=tmp_path / "plain", progress=False)
    tracked = orchard.run(
        recipe, out=tmp_path / "run", progress=False, track=["tensorboard", "mlflow"]
    )
    assert tracked.shared_digest == plain.shared_digest
    assert tracked.metrics == plain.metrics
    expected: Points = {}
    lines = MetricsLog(tmp_path / "run" / "metrics.jsonl").read()
    for number in range(3):
        values = round_values(line for line in lines if line["round"] == number)
        for key, value in values.items():
            expected.setdefault(key, []).append((number, pytest.approx(value, rel=1e-6)))
    assert {"round/train_loss", "round/uplink_bytes", "global/loss", "base/loss"} <= set(expected)
    assert read_tensorboard(tmp_path / "run") == expected
    assert read_mlflow(tmp_path) == expected
    parameters = only_mlflow_run().data.params
    assert parameters == {k: format_value(option_value(recipe, k)) for k in known_options()}


class StandIn:
    """A module of a library that is not installed; notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.Settings = SimpleNamespace

    def init(self, **arguments: Any) -> StandIn:
        self.calls.append(("init", arguments))
        return self

    def log(self, values: dict[str, float], **arguments: Any) -> None:
        self.calls.append(("log", {"values": values, **arguments}))

    def finish(self, **arguments: Any) -> None:
        self.calls.append(("finish", arguments))


def drive(tracker: Tracker, module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, module, stand_in)  # type: ignore[arg-type]
    tracker.begin(told(folder, last_round=None))
    tracker.log(FIRST, round_number=0)
    tracker.end(is_finished=False)
    return stand_in.calls


def test_wandb_is_asked_for_one_run_with_the_round_as_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    (_, opened), (_, logged), closed = drive(WeightsAndBiases(), "wandb", tmp_path, monkeypatch)
    assert (opened["project"], opened["id"]) == ("orchard", "0123456789abcdef")
    assert (opened["resume"], opened["config"]) == ("allow", PARAMETERS)
    assert opened["dir"] == str(tmp_path)
    assert logged == {"values": FIRST, "step": 0, "commit": True}
    assert closed == ("finish", {"exit_code": 1})


def test_trackio_is_asked_for_one_run_with_the_round_as_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    (_, opened), (_, logged), closed = drive(Trackio(), "trackio", tmp_path, monkeypatch)
    assert (opened["project"], opened["name"]) == ("mine", f"{tmp_path.name}-01234567")
    assert (opened["resume"], opened["config"]) == ("allow", PARAMETERS)
    assert logged == {"values": FIRST, "step": 0}
    assert closed == ("finish", {})
