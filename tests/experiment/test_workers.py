"""A run on several workers is the run of one process, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from federations import (
    COMBINATIONS,
    QUICK,
    RECIPES,
    SHORT,
    final_tensors,
    prepared,
    quick_recipe,
    run_quickly,
    short_model,
)
from orchard.cli import app
from orchard.engine.progress import Silent
from orchard.experiment import workers as workers_module
from orchard.experiment.crew_worker import make_worker
from orchard.experiment.planning import make_plan
from orchard.experiment.room import check_gpu, check_workers
from orchard.experiment.running import run_experiment
from orchard.experiment.workers import WorkerOptions, gpus_of, threads_note, worker_threads
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog

MEASURED = ("evaluation.models=base,global,local,personal", "evaluation.metrics=loss")
TWO = WorkerOptions(2)
# What these do differently from fedadam is done on the server, which workers never see.
LIKE_FEDADAM = ("fedavgm", "fedadagrad", "fedyogi", "flex+fedadam")


class Here:
    """A worker in this process: what it answers is computed alone, as another process would."""

    num_restarts = 0
    one_at_a_time = threading.Lock()

    def __init__(self, settings: Path) -> None:
        self.worker = make_worker(settings)

    def ask(self, header: Mapping[str, Any], body: bytes) -> tuple[Mapping[str, Any], bytes]:
        with self.one_at_a_time:
            reply, content = self.worker.handle(json.loads(json.dumps(header)), body)
        return json.loads(json.dumps(reply)), content


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers be in this process, where starting them costs nothing."""

    @contextmanager
    def places(
        recipe: Recipe, settings: Path, logs: Path, options: WorkerOptions
    ) -> Iterator[Sequence[Here]]:
        yield [Here(settings) for _ in range(options.number)]

    monkeypatch.setattr(workers_module, "_places", places)


def on_workers(folder: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    return run_experiment(
        prepared(recipe),
        folder=folder,
        reporter=options.pop("reporter", Silent()),
        workers=options.pop("workers", TWO),
        **options,
    )


def check_same(recipe: Recipe, folder: Path, **options: Any) -> dict[str, Any]:
    """Run a recipe in one process and on workers, compare all that it leaves, return the latter."""
    alone = run_quickly(folder / "alone", recipe)
    together = on_workers(folder / "together", recipe, **options)
    assert final_tensors(folder / "alone") == final_tensors(folder / "together")
    assert kept_files(folder / "alone") == kept_files(folder / "together")
    for key in ("shared_digest", "metrics", "train_loss_per_round", "parameters", "clients"):
        assert alone[key] == together[key], key
    assert together["base_is_unchanged"]
    assert [line["client"] for line in clients_of(folder / "alone")] == [
        line["client"] for line in clients_of(folder / "together")
    ]
    assert not (folder / "together" / "crew").exists()
    return together


def kept_files(folder: Path) -> dict[str, bytes]:
    """Return all that clients keep, by name: personal tensors, residuals, answers, scores."""
    found = folder / "clients"
    return {str(p.relative_to(found)): p.read_bytes() for p in found.rglob("*") if p.is_file()}


def clients_of(folder: Path) -> list[dict[str, Any]]:
    lines = MetricsLog(folder / "metrics.jsonl").read()
    return [line for line in lines if line["kind"] == "client"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "method",
    [
        *("flex", "scaffold", "hfedmoe"),
        *(pytest.param(m, marks=pytest.mark.long) for m in SHORT if m not in LIKE_FEDADAM),
        *(pytest.param(m, marks=pytest.mark.exhaustive) for m in LIKE_FEDADAM),
        *(pytest.param(m, marks=pytest.mark.exhaustive) for m in COMBINATIONS if m not in SHORT),
    ],
)
def test_two_workers_leave_the_bits_of_one_process(method: str, tmp_path: Path) -> None:
    check_same(quick_recipe(method, "client.steps=1"), tmp_path)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "overrides",
    [
        ("communication.downlink=differences", "communication.dtype=int8", *MEASURED),
        pytest.param(
            (
                *("privacy.unit=client", "privacy.epsilon=8", "privacy.delta=1e-3"),
                *("privacy.random=seed", "server.weighting=uniform"),
            ),
            marks=pytest.mark.long,
        ),
        pytest.param(("server.clients_per_round=3", *MEASURED), marks=pytest.mark.long),
    ],
)
def test_what_is_sent_and_measured_is_the_same_too(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    check_same(quick_recipe("fedavg", "client.steps=1", *overrides), tmp_path)


@pytest.mark.usefixtures("here")
def test_clients_with_the_same_test_set_have_what_is_common_measured_once(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Repeat w{i}", "response": f"w{i}", "category": "c"} for i in range(40)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    central = ("data.partition=iid", "data.num_clients=3", "data.test_per_category=4")
    recipe = quick_recipe("flex", "client.steps=1", f"data.path={data}", *central, *MEASURED)
    first, second, *_ = prepared(recipe).test.values()
    assert first is second
    check_same(recipe, tmp_path)


class Killer(Silent):
    """Kills a worker once, when so many clients are trained, with its process group's signal."""

    def __init__(self, what: str) -> None:
        self.what, self.killed = what, 0

    def working(self, what: str, *, share: float) -> None:
        if self.killed or not what.startswith(self.what):
            return
        own = children()
        assert len(own) == 2
        self.killed = own[0].pid
        os.kill(self.killed, signal.SIGKILL)


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [p for p in found if "orchard.experiment.crew_worker" in " ".join(p.cmdline())]


@pytest.mark.long  # whole processes; their answers are tested above, replacement in test_beside.py
def test_a_worker_that_is_killed_is_replaced_and_its_client_trains_again(tmp_path: Path) -> None:
    killer = Killer("1 of 4 trained")
    recipe = quick_recipe("flex", "client.steps=1")
    check_same(recipe, tmp_path, reporter=killer)
    assert killer.killed
    last = MetricsLog(tmp_path / "together" / "metrics.jsonl").read()[-1]
    assert sum(own["num_restarts"] for own in last["workers"]) == 1
    assert sum(own["num_turns"] for own in last["workers"]) == 8
    assert all(own["peak_bytes"] > 10**8 for own in last["workers"])
    assert last["round/peak_memory_bytes"] > sum(own["peak_bytes"] for own in last["workers"])
    assert not children()


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("flex+hfedmoe", marks=pytest.mark.long),
        *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ("scaffold", "fedmoe", "local")),
    ],
)
def test_other_methods_survive_that_too(method: str, tmp_path: Path) -> None:
    killer = Killer("2 of 4 trained")
    check_same(quick_recipe(method), tmp_path, reporter=killer)
    assert killer.killed


@pytest.mark.usefixtures("here")
def test_what_a_client_raises_in_a_worker_says_round_and_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise FloatingPointError("loss must be finite, got nan; lower client.lr")

    monkeypatch.setattr("orchard.strategies.strategy.train", fail)
    recipe = quick_recipe("fedavg")
    with pytest.raises(FloatingPointError, match=r"^loss must be finite") as caught:
        on_workers(tmp_path, recipe)
    first = next(iter(prepared(recipe).train))
    assert caught.value.__notes__ == [f"in round 1, client {first}, local training"]
    assert "crew_worker" in str(caught.value.__cause__)


@pytest.mark.usefixtures("here")
def test_a_run_begun_in_one_process_goes_on_with_two(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    class Stops(Silent):
        def completed(self, round_number: int, *, loss: float | None, uplink_bytes: int) -> None:
            raise Interrupted

    recipe = quick_recipe("flex", "client.steps=1")
    run_quickly(tmp_path / "whole", recipe)
    with pytest.raises(Interrupted):
        run_experiment(prepared(recipe), folder=tmp_path / "halves", reporter=Stops())
    on_workers(tmp_path / "halves", recipe)
    assert final_tensors(tmp_path / "whole") == final_tensors(tmp_path / "halves")


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output.strip()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--workers", 0), "--workers must be at least 1, got 0; 1 computes all clients in one"),
        (("--workers", -2), "--workers must be at least 1, got -2"),
        (("model.device=cuda",), "model.device must be a device of this machine, got cuda"),
        (("model.device=cuda:7",), "model.device must be a device of this machine, got cuda:7"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: tuple[object, ...], said: str, tmp_path: Path
) -> None:
    code, output = call("run", "tiny/fedavg", "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert said in output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_more_workers_than_memory_has_room_for_are_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick_recipe("fedavg")
    peak = max(c.peak.total for c in make_plan(recipe).clients if c.peak)
    check_workers(recipe, WorkerOptions(2), available=4 * peak)
    with pytest.raises(ValueError, match=r"^--workers must be in 1\.\.3 .*, got 9; lower it"):
        check_workers(recipe, WorkerOptions(9), available=4 * peak + peak // 2)
    with pytest.raises(ValueError, match=r"^--workers must be 1 .*, got 2; lower it"):
        check_workers(recipe, WorkerOptions(2), available=peak)
    check_workers(recipe, WorkerOptions(1), available=0)
    monkeypatch.setattr("orchard.experiment.room.available_memory_bytes", lambda: 2 * peak)
    code, output = call("run", "tiny/fedavg", "--out", tmp_path / "run", "--workers", 50)
    assert code == 2
    assert output.startswith("error: --workers must be") or "--workers must be" in output
    assert not (tmp_path / "run").exists()


def test_mapped_experts_count_for_no_worker() -> None:
    plain = quick_recipe("fedavg")
    mapped = quick_recipe("fedavg", "model.placement=mapped", "model.expert_cache=none")
    assert make_plan(plain).mapped_bytes == 0
    assert make_plan(mapped).mapped_bytes > 10**6


def test_a_gpu_with_too_little_memory_is_refused_with_what_would_fit() -> None:
    recipe = quick_recipe("fedavg", "client.batch_size=16")
    on_gpu = quick_recipe("fedavg", "client.batch_size=16", "model.device=cuda")

    def needed(batch_size: int) -> int:
        peaks = [
            c.peak
            for c in make_plan(quick_recipe("fedavg", f"client.batch_size={batch_size}")).clients
        ]
        return max(peak.training - peak.process for peak in peaks if peak)

    check_gpu(recipe, free=0)  # no GPU is asked for
    check_gpu(on_gpu, free=needed(16))
    said = r"^model\.device must have .* free for this recipe \(predicted\), got cuda with .*; "
    with pytest.raises(ValueError, match=said + r".*client\.batch_size=4 client\.grad_acc\S+=4"):
        check_gpu(on_gpu, free=needed(4))
    with pytest.raises(ValueError, match=said + r"no smaller batch fits either"):
        check_gpu(on_gpu, free=needed(1) // 4)


def test_threads_are_divided_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    free, fixed = (
        quick_recipe("fedavg", "model.num_threads=0"),
        quick_recipe("fedavg", "model.num_threads=3"),
    )
    assert (worker_threads(free, TWO), worker_threads(free, WorkerOptions(8))) == (2, 1)
    assert worker_threads(fixed, TWO) == 3
    assert "computes with 2 of 4 threads" in threads_note(free, TWO)
    assert not threads_note(fixed, TWO)


def test_each_worker_has_a_gpu_of_its_own_where_there_are_several() -> None:
    cuda = quick_recipe("fedavg", "model.device=cuda")
    numbers = [own["CUDA_VISIBLE_DEVICES"] for own in gpus_of(cuda, WorkerOptions(5), num_gpus=2)]
    assert numbers == ["0", "1", "0", "1", "0"]
    assert gpus_of(cuda, TWO, num_gpus=1) == [{}, {}]
    assert gpus_of(quick_recipe("fedavg"), TWO, num_gpus=4) == [{}, {}]


def test_a_method_that_was_passed_as_an_object_cannot_be_told_to_workers(tmp_path: Path) -> None:
    def own(strategy: Any) -> Any:
        return strategy

    with pytest.raises(ValueError, match=r"^strategy must be named in the recipe with 2 workers"):
        on_workers(tmp_path, quick_recipe("fedavg"), strategy=own)


@pytest.mark.long
def test_a_run_that_is_killed_takes_its_workers_with_it_and_goes_on_as_it_was_started(
    tmp_path: Path,
) -> None:
    overrides = ["server.rounds=3", "client.steps=1", f"model.path={short_model()}", *QUICK[1:2]]
    overrides += ["evaluation.models=", "evaluation.retention_path="]
    tiny = str(RECIPES / "tiny" / "flex.toml")
    run_quickly(tmp_path / "whole", read_recipe(tiny, overrides).recipe)
    command = [sys.executable, "-c", "from orchard.cli import main; main()"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed, log = tmp_path / "killed", (tmp_path / "log").open("wb")
    begun = [*command, "run", tiny, *overrides, "--workers", "2", "--out", str(killed)]
    process = subprocess.Popen(begun, env=environment, stdout=log, stderr=log)
    end = time.monotonic() + 120
    while not list((killed / "checkpoints").glob("round_*/state.json")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    again = [*command, "resume", str(killed)]
    subprocess.run(again, env=environment, check=True, stdout=log, stderr=log)
    log.close()
    assert final_tensors(tmp_path / "whole") == final_tensors(killed)
    last = MetricsLog(killed / "metrics.jsonl").read()[-1]
    assert len(last["workers"]) == 2
