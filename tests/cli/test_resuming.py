"""A run that stopped says where, and goes on by its folder alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from federations import QUICK, short_model
from orchard.cli import app
from orchard.deployment.hosting import CoordinatorOptions
from orchard.engine.progress import Lines

ROWS = [{"instruction": f"Repeat word{i}", "response": f"word{i}"} for i in range(24)]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_after(
    monkeypatch: pytest.MonkeyPatch, last_round: int, how: Callable[[], None] = interrupt
) -> None:
    """Let whoever shows progress be interrupted when a round is complete, once."""
    real = Lines.completed

    def completed(self: Lines, round_number: int, **about: object) -> None:
        real(self, round_number, **about)  # type: ignore[arg-type]
        if round_number == last_round:
            monkeypatch.setattr(Lines, "completed", real)
            how()

    monkeypatch.setattr(Lines, "completed", completed)


def read(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "result.json").read_text())
    return found


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Be in a folder with data, and return what starts a run there with a relative path."""
    (tmp_path / "start").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = ["data.path=rows.jsonl", "data.partition=iid", "data.num_clients=2"]
    quick = [*QUICK, "server.rounds=3", "client.steps=1", f"model.path={short_model()}"]
    return ["run", "tiny/fedavg", *data, *quick]


@pytest.mark.parametrize("how", [interrupt, terminate])
def test_an_interrupted_run_says_where_it_stopped_and_goes_on_from_anywhere(
    begun: list[str], how: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(*begun, "--out", "whole").exit_code == 0
    stop_after(monkeypatch, 2, how)
    stopped = call(*begun, "--out", "part")
    assert stopped.exit_code == 130
    *_, said = stopped.stderr.strip().splitlines()
    assert said == "stopped after round 2 of 3; go on with: orchard resume part"
    folder = tmp_path / "start" / "part"
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = call("resume", folder)
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after round 2" in resumed.output
    whole = read(tmp_path / "start" / "whole")
    assert read(folder)["shared_digest"] == whole["shared_digest"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_run_with_resume_takes_the_folder_in_place_of_the_recipe(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 1)
    assert call(*begun, "--out", "part").exit_code == 130
    refused = call("run", "part")
    assert refused.exit_code == 2
    assert "orchard resume part" in refused.stderr
    resumed = call("run", "part", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "resuming after round 1" in resumed.output
    assert read(Path("part"))["num_rounds"] == 3


def test_a_resumed_run_goes_on_being_tracked(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    stop_after(monkeypatch, 1)
    assert call(*begun, "--out", "part", "--track", "tensorboard").exit_code == 130
    before = len(list(Path("part/tensorboard").iterdir()))
    assert call("resume", "part").exit_code == 0
    assert len(list(Path("part/tensorboard").iterdir())) > before


def test_a_run_that_stopped_before_a_round_was_complete_says_so(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchard.engine.simulator.save_checkpoint", lambda *a, **k: interrupt())
    stopped = call(*begun, "--out", "part")
    assert stopped.exit_code == 130
    assert "stopped before its first round was complete; go on with" in stopped.stderr


def test_only_how_long_to_wait_may_change(begun: list[str]) -> None:
    assert call(*begun, "--out", "part").exit_code == 0
    refused = call("resume", "part", "server.rounds=9")
    assert refused.exit_code == 2
    assert "server.rounds must be 3" in refused.stderr
    assert call("resume", "part", "deployment.join_seconds=9").exit_code == 0


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    refused = call("resume", tmp_path)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: run must be a folder with a recipe.toml, got ")


def test_a_start_elsewhere_that_is_gone_is_said(
    begun: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(*begun, "--out", "part").exit_code == 0
    moved = tmp_path / "moved"
    (tmp_path / "start").rename(moved)
    monkeypatch.chdir(moved)
    resumed = call("resume", "part")
    assert resumed.exit_code == 0, resumed.output
    assert "note: the run was started in " in resumed.stderr


def test_a_coordinated_run_goes_on_as_its_coordinator(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr")
    seen = []

    def supervise(options: CoordinatorOptions, folder: Path) -> None:
        seen.append((options, folder))
        interrupt()

    monkeypatch.setattr("orchard.deployment.hosting._supervise", supervise)
    started = ["coordinate", *begun[1:2], f"model.path={short_model()}", "deployment.sites=2"]
    for arguments in ([*started, "--address", "127.0.0.1:8555", "--out", "run"], ["resume", "run"]):
        stopped = call(*arguments)
        assert stopped.exit_code == 130, stopped.output
        assert "go on with: orchard resume " in stopped.stderr
    (first, folder), (again, folder_again) = seen
    assert folder_again == folder == Path("run").resolve()
    # Its own processes' port is free when it starts, and another each time.
    assert replace(again, folder=first.folder, own_port=first.own_port) == first
    assert first.address == "127.0.0.1:8555"
