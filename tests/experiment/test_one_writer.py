"""Two processes never write one run's folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from federations import QUICK, final_tensors, quick_recipe, run_quickly, short_model
from orchard.cli import app
from orchard.engine.processes import InUseError, check_free
from orchard.engine.progress import Lines
from orchard.experiment.run_folder import LOCK_FILE, check_unused, writing_alone

SHORTEST = ("server.rounds=1", "client.steps=1")
HOLDER = """
import sys, time
from pathlib import Path
from orchard.engine.processes import only_one
with only_one(Path(sys.argv[1]), seconds=0.0, what="holder"):
    print("held", flush=True)
    time.sleep(600)
"""


def words_of(folder: Path) -> list[str]:
    quick = [*QUICK, *SHORTEST, f"model.path={short_model()}"]
    return ["run", "tiny/fedavg", *quick, "--out", str(folder)]


def call(arguments: list[str], said: Path) -> None:
    """Run a command in this process, which then ends with its exit code."""
    result = CliRunner().invoke(app, arguments)
    said.write_text(result.stderr)
    os._exit(result.exit_code)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("resume", [[], pytest.param(["--resume"], marks=pytest.mark.long)])
def test_of_two_processes_at_once_one_runs_and_the_other_says_who(
    resume: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def wait(self: Lines, round_number: int, **about: object) -> None:
        end = time.monotonic() + 20.0
        while not list(tmp_path.glob("*.txt")) and time.monotonic() < end:
            time.sleep(0.05)

    monkeypatch.setattr(Lines, "completed", wait)  # whoever runs does so until the other has ended
    run_quickly(tmp_path / "alone", quick_recipe("fedavg", *SHORTEST))
    fork = multiprocessing.get_context("fork")  # nothing is imported twice
    arguments = [*words_of(folder), *resume]
    both = [fork.Process(target=call, args=(arguments, tmp_path / f"{i}.txt")) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    codes = [process.exitcode for process in both]
    assert sorted(codes) == [0, 1]
    ran, refused = both[codes.index(0)], codes.index(1)
    *_, line = (tmp_path / f"{refused}.txt").read_text().splitlines()
    assert line.startswith("error: only one writer of a run's folder may run, got process ")
    assert f"process {ran.pid} of " in line
    assert "; wait until it ends, stop it, or use another folder" in line
    assert final_tensors(folder) == final_tensors(tmp_path / "alone")


@pytest.mark.parametrize("command", ["run", "run --resume", "resume", "coordinate", "study"])
def test_every_command_that_writes_is_refused_and_changes_nothing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if command == "resume":
        CliRunner().invoke(app, words_of(folder))
    arguments = {
        "run": words_of(folder),
        "run --resume": [*words_of(folder), "--resume"],
        "resume": ["resume", str(folder)],
        "coordinate": ["coordinate", *words_of(folder)[1:], "deployment.sites=2"],
        "study": ["study", str(tmp_path / "study.toml"), "--out", str(folder)],
    }[command]
    if command == "study":
        (tmp_path / "study.toml").write_text(STUDY.format(model=short_model()))
    monkeypatch.setattr("orchard.deployment.hosting.LOCK_SECONDS", 0.0)
    before = files_of(folder)
    with holding(folder / ("study.lock" if command == "study" else LOCK_FILE)) as holder:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1, result.output
        *_, line = result.stderr.splitlines()
        assert line.startswith("error: only one writer of a ")
        assert f"got process {holder} of " in line
    assert {n: c for n, c in files_of(folder).items() if n != "study.lock"} == before


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holding(folder / LOCK_FILE) as holder:
        with pytest.raises(InUseError, match=f"process {holder} of "):
            check_unused(folder)
        os.kill(holder, signal.SIGKILL)
        with writing_alone(folder, seconds=30.0):
            pass
    check_unused(folder)
    assert run_quickly(folder, quick_recipe("fedavg", *SHORTEST))["base_is_unchanged"]


def test_a_run_that_began_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    from orchard.api import execute, prepare

    recipe = quick_recipe("fedavg", *SHORTEST)
    waiting = prepare(recipe, out=tmp_path / "run")
    run_quickly(tmp_path / "run", recipe)
    before = files_of(tmp_path / "run")
    with pytest.raises(ValueError, match="--out must be a new folder"):
        execute(waiting, progress=False)
    assert files_of(tmp_path / "run") == before


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(file: object, kind: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("orchard.engine.processes.fcntl.flock", no_locks)
    with writing_alone(tmp_path / "run"):
        pass
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith(f"the file system of {tmp_path / 'run' / LOCK_FILE} has no locks")


STUDY = """
reference = "fedavg"
seeds = [0]
set = {{ model.path = "{model}", evaluation.metrics = "loss" }}
[[method]]
recipe = "tiny/fedavg"
"""


@contextmanager
def holding(path: Path) -> Iterator[int]:
    """Let another process hold a lock file; give its number."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process.pid
        finally:
            process.kill()
    check_free(path, what="holder")
