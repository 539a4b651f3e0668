"""Workers on a Ray cluster of two nodes on this machine; skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from federations import final_tensors, prepared, quick_recipe, run_quickly
from orchard.cli import app
from orchard.engine.on_ray import check_address
from orchard.engine.processes import free_port
from orchard.engine.progress import Silent
from orchard.experiment.running import run_experiment
from orchard.experiment.workers import WorkerOptions
from orchard.extras import lacking

needs_ray = pytest.mark.skipif(bool(lacking("ray")), reason="Ray is not installed")


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start two nodes of one core each, and return the address of the first."""
    address = f"127.0.0.1:{free_port()}"
    command = [str(Path(sys.executable).parent / "ray"), "start", "--num-cpus=1", "--block"]
    head = [
        *command,
        "--head",
        f"--port={address.rpartition(':')[2]}",
        "--include-dashboard=false",
        "--node-ip-address=127.0.0.1",
        "--object-store-memory=100000000",
    ]
    second = [
        *command,
        f"--address={address}",
        "--node-ip-address=127.0.0.2",
        "--object-store-memory=100000000",
    ]
    folder = tmp_path_factory.mktemp("ray")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    nodes = []
    try:
        for number, one in enumerate((head, second)):
            log = folder / f"node{number}"
            with log.open("wb") as file:
                nodes.append(subprocess.Popen(one, stdout=file, stderr=file, env=environment))
            end = time.monotonic() + 90
            while "Ray runtime started" not in log.read_text():
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        started = [p for node in nodes for p in psutil.Process(node.pid).children(recursive=True)]
        for process in (*nodes, *started):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for node in nodes:
            node.wait(60)


@needs_ray
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_nodes_leave_the_bits_of_one_process_after_an_actor_was_killed_too(
    cluster: str, tmp_path: Path
) -> None:
    recipe = quick_recipe("flex", "client.steps=1", "model.num_threads=1")

    class Kills(Silent):
        killed = 0

        def working(self, what: str, *, share: float) -> None:
            if not self.killed and what.startswith("1 of 4 trained"):
                # Of the nodes that this process started, and of no other cluster.
                tree = psutil.Process().children(recursive=True)
                self.killed = next(p.pid for p in tree if p.name().startswith("ray::Worker"))
                os.kill(self.killed, signal.SIGKILL)

    run_quickly(tmp_path / "alone", recipe)
    reporter = Kills()
    result = run_experiment(
        prepared(recipe),
        folder=tmp_path / "cluster",
        reporter=reporter,
        workers=WorkerOptions(2, cluster),
    )
    assert reporter.killed
    assert final_tensors(tmp_path / "alone") == final_tensors(tmp_path / "cluster")
    assert result["base_is_unchanged"]


@needs_ray
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_more_workers_than_the_cluster_has_cpus_is_one_line(cluster: str, tmp_path: Path) -> None:
    recipe = quick_recipe("flex", "model.num_threads=1")
    with pytest.raises(
        ConnectionError, match=r"^--workers must fit the Ray cluster, got 9 workers"
    ):
        run_experiment(
            prepared(recipe), folder=tmp_path, reporter=Silent(), workers=WorkerOptions(9, cluster)
        )


@pytest.mark.parametrize("address", ["10.0.0.1", "host:", ":6379", "host:port", "host:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"^--ray must be host:port or auto, got "):
        check_address(address)


def test_an_address_that_does_not_answer_is_one_line_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        busy = f"127.0.0.1:{server.getsockname()[1]}"
        check_address(busy)
    started = time.monotonic()
    with pytest.raises(
        ConnectionError, match=rf"^--ray must be .* answers, got {busy}, which does"
    ):
        check_address(busy)
    assert time.monotonic() - started < 5


def test_the_command_says_so_before_it_reads_anything(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    result = CliRunner().invoke(
        app, ["run", "tiny/fedavg", "--ray", address, "--out", str(tmp_path / "run")]
    )
    assert result.exit_code == 2
    said = "ray must be installed to use a Ray cluster" if lacking("ray") else "--ray must be"
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
