"""SIGKILL at random moments to every kind of process of a federation, in one run.

    python tests/faults/kills.py --kills 30 --model MODEL --data FOLDER --out FOLDER

runs the same recipe undisturbed in the simulator and killed between processes, and writes what
happened at each kill; ``python -m benchmarks.pages faults`` makes the page of it. FOLDER of --data
has one .jsonl file for each site.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from orchard.deployment.localhost import ORCHARD, Processes, running
from orchard.results import MetricsLog, environment
from sites import same, shared_tensors

FEW_ROWS = ("--min-test", "1")  # what may leave is no subject here
TARGETS = ("coordinator", "superlink", "rounds", "site", "supernode", "worker")


@dataclass
class Kill:
    """One SIGKILL and what came of it.

    Attributes:
        target: Which kind of process.
        site: Whose, where it was a site's.
        at_seconds: Since the coordinator's first start.
        after_round: Rounds that were complete then.
        recovered_seconds: Until the next round was complete; 0 where the run ended before.
    """

    target: str
    site: str
    at_seconds: float
    after_round: int
    recovered_seconds: float = 0.0


def kill(process: psutil.Process | subprocess.Popen[bytes]) -> None:
    """Send SIGKILL; what is our own child is waited for."""
    process.send_signal(signal.SIGKILL)
    if isinstance(process, subprocess.Popen):
        process.wait(10)


class Saboteur:
    """Kills processes of a federation, and starts again what nobody else does."""

    def __init__(
        self, federation: Processes, recipe: Path, options: Sequence[str], *, run: Path, seed: int
    ) -> None:
        """Prepare to run ``recipe`` in ``run``."""
        self._federation, self._recipe, self._options = federation, recipe, options
        self._run = run
        self._draw = np.random.default_rng(seed)
        self.kills: list[Kill] = []

    def go(self, targets: Sequence[str], *, pause: tuple[float, float], seconds: float) -> None:
        """Run to the end, killing each of ``targets`` in turn after a random pause.

        Raises:
            AssertionError: The run does not end in time, or ends in an error.
        """
        started = time.monotonic()
        coordinator = self._start(resume=False)
        waiting = list(targets)
        next_at = started + self._draw.uniform(*pause)
        while True:
            now = time.monotonic()
            assert now - started < seconds, f"the run must end\n{self._federation.tail()}"
            self._note_recovery(now - started)
            code = coordinator.poll()
            if code == 0:
                break
            assert code is None, f"the coordinator must go on\n{self._federation.tail()}"
            if waiting and now >= next_at:
                process, site = self._find(waiting[0], coordinator)
                if process is not None:
                    target = waiting.pop(0)
                    kill(process)
                    self.kills.append(Kill(target, site, now - started, self._num_rounds()))
                    if target == "coordinator":
                        coordinator = self._start(resume=True)
                    elif target == "site":
                        self._federation.start_site(site)
                    next_at = time.monotonic() + self._draw.uniform(*pause)
            time.sleep(0.1)

    def _start(self, *, resume: bool) -> subprocess.Popen[bytes]:
        return self._federation.start_coordinator(
            self._recipe, self._options, run=self._run, resume=resume
        )

    def _find(
        self, target: str, coordinator: subprocess.Popen[bytes]
    ) -> tuple[psutil.Process | subprocess.Popen[bytes] | None, str]:
        """Return a process to kill, if there is one of that kind now, and whose it is."""
        if target == "coordinator":
            return coordinator, ""
        if target == "superlink":
            return _child(coordinator.pid, "orchard.engine.superlink"), ""
        if target == "rounds":
            address = self._own_address()
            for process in psutil.process_iter(["cmdline"]):
                command = " ".join(process.info["cmdline"] or ())
                if "flwr-serverapp" in command and address in command:
                    return process, ""
            return None, ""
        name = str(self._draw.choice(self._federation.names))
        site = self._federation.sites[name]
        if target == "site":
            return site, name
        pattern = "engine.supernode" if target == "supernode" else "site_worker"
        return _child(site.pid, pattern), name

    def _own_address(self) -> str:
        """Return where the coordinator's own processes call; it is drawn at each of its starts."""
        path = self._run / "flower" / "config.toml"
        if not path.exists():
            return "not there yet"
        return str(tomllib.loads(path.read_text())["superlink"]["own"]["address"])

    def _num_rounds(self) -> int:
        lines = MetricsLog(self._run / "metrics.jsonl").read()
        return max((line["round"] for line in lines if line["kind"] == "round"), default=0)

    def _note_recovery(self, now: float) -> None:
        rounds = self._num_rounds()
        for own in self.kills:
            if not own.recovered_seconds and rounds > own.after_round:
                own.recovered_seconds = now - own.at_seconds


def _child(parent: int, pattern: str) -> psutil.Process | None:
    try:
        children = psutil.Process(parent).children()
        return next((c for c in children if pattern in " ".join(c.cmdline())), None)
    except psutil.NoSuchProcess:
        return None


def random_targets(number: int, seed: int) -> list[str]:
    """Return a random order of targets in which each kind comes equally often."""
    repeated = (TARGETS * (number // len(TARGETS) + 1))[:number]
    return [str(target) for target in np.random.default_rng(seed).permutation(repeated)]


def main() -> None:
    """Run the long form and write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    options = [f"model.path={given.model}", f"server.rounds={given.rounds}"]
    with tempfile.TemporaryDirectory(prefix="orchard-kills-") as name:
        folder = Path(name)
        simulated = folder / "simulated"
        command = [ORCHARD, "run", str(given.recipe), *options, f"data.path={given.data}"]
        subprocess.run([*command, "--out", str(simulated)], check=True, capture_output=True)
        federation = Processes(
            folder / "federation", given.data, ["--model", given.model, *FEW_ROWS]
        )
        with running(federation):
            saboteur = Saboteur(
                federation, given.recipe, options, run=folder / "run", seed=given.seed
            )
            started = time.monotonic()
            saboteur.go(random_targets(given.kills, given.seed), pause=(1.0, 20.0), seconds=3600.0)
            seconds = time.monotonic() - started
        result = json.loads((simulated / "result.json").read_text())
        record = {
            **environment(),
            "recipe_digest": result["recipe_digest"],
            "data_digest": result["data_digest"],
            "rounds": given.rounds,
            "seconds": seconds,
            "is_equal": same(shared_tensors(folder / "run"), shared_tensors(simulated)),
            "kills": [asdict(own) for own in saboteur.kills],
        }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "kills.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(saboteur.kills)} kills in {seconds:.0f} s; equal: {record['is_equal']}")


if __name__ == "__main__":
    main()
