"""What the simulator adds to training: rounds of many clients that answer and never train.

The tiny recipe's model, messages, log and checkpoints are those of a run. Local training alone is
replaced, here and nowhere else: it leaves the model as it was sent. A client's turn is what is
left, and a process for each number of clients shows whether memory grows with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from orchard.catalog import find_recipe
from orchard.client.store import ClientStore
from orchard.client.training import TrainingReport
from orchard.engine import simulator
from orchard.engine.progress import Silent
from orchard.engine.turns import Alone
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import build_clients, build_schedule, load_model
from orchard.experiment.settings import learning_rate
from orchard.experiment.wiring import build_channel
from orchard.models.stored.loading import threads
from orchard.process_memory import loading_to_stay, peak_memory_bytes, resident_memory_bytes
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog
from orchard.seeding import Seeds
from orchard.strategies.strategy import start_server

_RECIPE = Path("tiny/fedavg.toml")
_OVERRIDES = ("evaluation.models=", "evaluation.retention_path=")


def _leave_as_it_is(*arguments: Any, **settings: Any) -> TrainingReport:
    """Stand in for local training."""
    return TrainingReport(
        loss=1.0,
        num_steps=0,
        num_tokens=0,
        num_examples=0,
        seconds=0.0,
        moved=frozenset(),
        mean_gradient=None,
    )


def run_rounds(num_clients: int, num_rounds: int) -> dict[str, float]:
    """Run rounds of all clients in this process, without training.

    Returns:
        ``seconds_per_client`` and ``cpu_seconds_per_client``, of a client's turn in a round;
        ``message_bytes_per_client``, up and down, of which ``header_bytes_per_client`` are no
        tensors; ``log_bytes_per_client``; ``peak_bytes``, and what the process had before the first
        client, ``process_bytes``.
    """
    overrides = [*_OVERRIDES, f"server.rounds={num_rounds}"]
    recipe = read_recipe(find_recipe(_RECIPE), overrides).recipe
    with tempfile.TemporaryDirectory(prefix="orchard-bench-") as name, threads(1):
        folder = Path(name)
        experiment = prepare_experiment(recipe)
        model = load_model(recipe, experiment.tokenizer)
        first, *_ = build_clients(experiment, model, folder / "clients")
        state = start_server(build_strategy(recipe, num_clients=num_clients), model.fresh)
        with loading_to_stay():  # as orchard run does
            pass
        process = resident_memory_bytes()
        clients = [
            replace(
                first,
                client_id=f"client {number}",
                store=ClientStore(folder / "clients" / str(number), model.base_digest),
            )
            for number in range(num_clients)
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        strategy, channel = build_strategy(recipe, num_clients=num_clients), build_channel(recipe)
        with patch("orchard.strategies.strategy.train", _leave_as_it_is):
            simulator.run_rounds(
                strategy,
                Alone(strategy, clients, channel),
                state,
                schedule=build_schedule(recipe, rate=learning_rate(recipe, model.view)),
                channel=channel,
                seeds=Seeds(recipe.seed),
                folder=folder,
                about={},
                reporter=Silent(),
                title="rounds",
            )
        turns = num_clients * num_rounds
        seconds = (time.perf_counter() - wall) / turns
        cpu_seconds = (time.process_time() - cpu) / turns
        peak = peak_memory_bytes()
        log = MetricsLog(folder / "metrics.jsonl")
        rounds = [line for line in log.read() if line["kind"] == "round"]
        sent = sum(line["round/uplink_bytes"] + line["round/downlink_bytes"] for line in rounds)
        tensors = sum(tensor.nbytes for tensor in state.shared.values())
        return {
            "seconds_per_client": seconds,
            "cpu_seconds_per_client": cpu_seconds,
            "message_bytes_per_client": sent / turns,
            "header_bytes_per_client": sent / turns - 2 * tensors,
            "log_bytes_per_client": log.path.stat().st_size / turns,
            "peak_bytes": peak,
            "process_bytes": process,
        }


def _measure(num_clients: int, num_rounds: int) -> dict[str, float]:
    """Run ``run_rounds`` in a process of its own.

    Raises:
        RuntimeError: It failed; with the end of what it wrote.
    """
    command = [
        sys.executable,
        "-m",
        "orchard.measurements.rounds",
        json.dumps([num_clients, num_rounds]),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measured rounds failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bench_rounds(
    *,
    num_clients: int = 1000,
    num_rounds: int = 3,
    memory_of: Sequence[int] = (100, 1000, 10_000),
    repeats: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a client's turn, and how the peak grows with the number of clients.

    Args:
        num_clients: Of the rounds that are timed.
        num_rounds: So many.
        memory_of: Numbers of clients whose peaks are compared, in one round each.
        repeats: Processes that are timed; medians.
        say: Hears of every process that ended.

    Returns:
        What ``run_rounds`` returns; ``peak_bytes_of``, by number of clients, and
        ``peak_ratio``, that of the most clients over that of the fewest;
        ``grown_bytes_per_client``, by which the peak rises from the fewest to the most.
    """
    timed = []
    for number in range(repeats):
        timed.append(_measure(num_clients, num_rounds))
        say(
            f"{num_clients} clients {number + 1}/{repeats}: "
            f"{1000 * timed[-1]['seconds_per_client']:.2f} ms per client and round"
        )
    peaks = {}
    for count in memory_of:
        peaks[count] = _measure(count, 1)["peak_bytes"]
        say(f"{count} clients: peak {peaks[count] / 1e6:.0f} MB")
    fewest, most = min(memory_of), max(memory_of)
    return {
        "num_clients": num_clients,
        "num_rounds": num_rounds,
        "repeats": repeats,
        **{key: median(run[key] for run in timed) for key in timed[0]},
        "peak_bytes_of": {str(count): peak for count, peak in peaks.items()},
        "peak_ratio": peaks[most] / peaks[fewest],
        "grown_bytes_per_client": (peaks[most] - peaks[fewest]) / max(most - fewest, 1),
    }


def main(arguments: Sequence[str]) -> None:
    """Run the rounds that are given as JSON, and print what was found as JSON."""
    num_clients, num_rounds = json.loads(arguments[0])
    print(json.dumps(run_rounds(num_clients, num_rounds)))


if __name__ == "__main__":
    main(sys.argv[1:])
