"""Eight clients' models in one batch, beside one model and one after another."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from orchard.measurements.serving_load import load_server
from orchard.measurements.serving_models import random_model
from orchard.measurements.serving_peer import beside_transformers
from orchard.models.stored.loading import load_base
from orchard.models.view.moe import MoEView
from orchard.process_memory import peak_memory_bytes
from orchard.serving.engine import Engine, Row
from orchard.serving.values import RowValues

_NUM_CLIENTS, _MANY, _PROMPT_TOKENS, _NEW_TOKENS = 8, 100, 32, 48


def bench_serving(
    *, repeats: int, model: str, say: Callable[[str], None], seconds: float = 60.0
) -> dict[str, Any]:
    """Measure the engine with models of random adapters and grafts.

    Args:
        repeats: Runs of each side; the medians count.
        model: The base.
        say: Told what is measured.
        seconds: How long the server is asked by 50 at a time.

    Returns:
        Tokens per second, memory, what 50 at a time saw over HTTP; None for what is not measured,
        with the reason.
    """
    view = load_base(model, dtype="float32").view
    models = [random_model(view, seed) for seed in range(_NUM_CLIENTS)]
    say(f"serve: {_NUM_CLIENTS} clients on {model}")
    sides = {
        "mixed": [models],
        "single": [[models[0]] * _NUM_CLIENTS],
        "sequential": [[one] for one in models],
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    _speed(view, sides["mixed"])  # the first pass also pays for what is made once
    for _ in range(repeats):
        for name, batches in sides.items():
            found[name].append(_speed(view, batches))
    speeds = {name: statistics.median(own) for name, own in found.items()}
    say(f"serve: memory of 1, 8 and {_MANY} models")
    memory = {number: _memory_of(model, number) for number in (1, _NUM_CLIENTS, _MANY)}
    say(f"serve: 50 requests at a time over HTTP, {seconds:g} s")
    load = load_server(model, num_models=_NUM_CLIENTS, seconds=seconds)
    beside = beside_transformers(model, repeats=repeats, seconds=seconds / 6, say=say)
    return {
        "model": model if model.startswith("orchard:") else Path(model).name,
        "repeats": repeats,
        "num_threads": torch.get_num_threads(),
        **{f"{name}_tokens_per_second": speed for name, speed in speeds.items()},
        "mixed_over_sequential": speeds["mixed"] / speeds["sequential"],
        "mixed_over_single": speeds["mixed"] / speeds["single"],
        "bytes_per_model": models[0].num_bytes(),
        "memory_1_bytes": memory[1],
        "memory_8_over_1": memory[_NUM_CLIENTS] / memory[1],
        "memory_100_over_1": memory[_MANY] / memory[1],
        **load,
        **beside,
    }


def _memory_of(model: str, number: int) -> int:
    """Return the peak resident bytes of a process that serves so many models of a base."""
    command = [sys.executable, "-m", "orchard.measurements.serving", model, str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1])


def _serve_and_print_peak(model: str, number: int) -> None:
    view = load_base(model, dtype="float32").view
    models = [random_model(view, seed) for seed in range(number)]
    starts = range(0, number, _NUM_CLIENTS)
    _speed(view, [models[start : start + _NUM_CLIENTS] for start in starts])
    print(peak_memory_bytes())


def _speed(view: MoEView, batches: Sequence[Sequence[RowValues]]) -> float:
    """Return the tokens per second of batches one after another."""
    draw, engine, num_tokens = random.Random(0), Engine(view), 0
    started = time.perf_counter()
    with engine.running():
        for models in batches:
            for values in models:
                prompt = [draw.randrange(10, 300) for _ in range(_PROMPT_TOKENS)]
                engine.submit(Row(values, prompt, _NEW_TOKENS))
                num_tokens += _NEW_TOKENS
            while not engine.is_idle:
                engine.step()
    return num_tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    _serve_and_print_peak(sys.argv[1], int(sys.argv[2]))
