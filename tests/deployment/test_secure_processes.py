"""Secure sums between real processes, with TLS and keys, which are killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from orchard.communication.audit import read_audit
from orchard.deployment.localhost import ORCHARD, Processes, running
from sites import same, shared_tensors, write_sites

pytestmark = pytest.mark.deployment

RECIPE = """
[model]
path = "orchard:tiny"
num_threads = 1
lora_dropout = 0.0

[data]
partition = "file"
test_size = 0.25

[strategy]
name = "fedavg"

[client]
steps = 1
batch_size = 4

[server]
rounds = 2

[evaluation]
models = ""
retention_path = ""

[privacy]
secure_aggregation = true

[deployment]
sum_seconds = 20.0
probe_seconds = 2.0
attempts = 8
"""


def worker_of(site: int) -> psutil.Process:
    """Return the worker of a site's process."""
    return next(
        child
        for child in psutil.Process(site).children(recursive=True)
        if "orchard.deployment.site_worker" in child.cmdline()
    )


def test_processes_that_are_killed_in_a_sum_end_with_the_simulators_tensors(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data", num_sites=3)
    recipe, simulated, run = tmp_path / "recipe.toml", tmp_path / "simulated", tmp_path / "run"
    recipe.write_text(RECIPE)
    subprocess.run(
        [ORCHARD, "run", str(recipe), f"data.path={data}", "--out", simulated],
        check=True,
        capture_output=True,
    )
    peers = str(tmp_path / "federation" / "keys" / "sites")
    options = ("--peers", peers, "--secure-least", "3", "--min-test", "1")

    def steps(name: str) -> list[str]:
        path = federation.store(name) / "audit.jsonl"
        events = read_audit(path) if path.exists() else []
        return [event["step"] for event in events if event["event"] == "summed"]

    def wait_for(step: str, number: int) -> None:
        end = time.monotonic() + 240
        while steps("hill").count(step) < number:
            assert time.monotonic() < end, federation.tail()
            assert coordinator.poll() is None, federation.tail()
            time.sleep(0.02)

    with running(Processes(tmp_path / "federation", data, options)) as federation:
        coordinator = federation.start_coordinator(recipe, (), run=run)
        wait_for("sum_vector", 1)
        worker_of(federation.sites["hill"].pid).kill()
        wait_for("sum_shares", 2)
        for process in psutil.Process(coordinator.pid).children(recursive=True):
            process.kill()
        os.kill(coordinator.pid, signal.SIGKILL)
        coordinator.wait(20)
        coordinator = federation.start_coordinator(recipe, (), run=run, resume=True)
        assert coordinator.wait(400) == 0, federation.tail()
        assert same(shared_tensors(run), shared_tensors(simulated))
    result = json.loads((run / "result.json").read_text())
    assert result["secure_aggregation"] == {"least": 3, "bound": 16.0, "neighbors": 0}
    sums = [e for e in read_audit(run / "audit.jsonl") if e["event"] == "secure_sum"]
    assert [e["round"] for e in sums if e["sum"] == "summed"] == [1, 2]
    begun = [e["nonce"] for e in sums if e["sum"] == "begun"]
    assert len({*begun}) == len(begun) >= 4
