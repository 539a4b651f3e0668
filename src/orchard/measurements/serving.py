"""Eight clients' models in one batch, beside one model and one after another."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from orchard.experts.grafting import GraftSettings
from orchard.measurements.serving_load import load_server
from orchard.models.stored.loading import load_base, load_tokenizer
from orchard.models.trainable.slots import canonical
from orchard.models.trainable.targets import LoraSettings, find_targets
from orchard.models.view.moe import MoEView
from orchard.process_memory import peak_memory_bytes
from orchard.serving.engine import Engine, Row
from orchard.serving.values import RowValues, read_values

_NUM_CLIENTS, _MANY, _PROMPT_TOKENS, _NEW_TOKENS, _RANK = 8, 100, 32, 48, 16


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
    models = [_random_model(view, seed) for seed in range(_NUM_CLIENTS)]
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
    load = load_server(view, load_tokenizer(model), models, seconds=seconds)
    return {
        "model": model,
        **{f"{name}_tokens_per_second": speed for name, speed in speeds.items()},
        "mixed_over_sequential": speeds["mixed"] / speeds["sequential"],
        "mixed_over_single": speeds["mixed"] / speeds["single"],
        "bytes_per_model": models[0].num_bytes(),
        "memory_1_bytes": memory[1],
        "memory_8_over_1": memory[_NUM_CLIENTS] / memory[1],
        "memory_100_over_1": memory[_MANY] / memory[1],
        **load,
        "over_transformers_serve": None,
        "why_none": "over_transformers_serve: no peer is started by this measurement",
    }


def _memory_of(model: str, number: int) -> int:
    """Return the peak resident bytes of a process that serves so many models of a base."""
    command = [sys.executable, "-m", "orchard.measurements.serving", model, str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1])


def _serve_and_print_peak(model: str, number: int) -> None:
    view = load_base(model, dtype="float32").view
    models = [_random_model(view, seed) for seed in range(number)]
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


def _random_model(view: MoEView, seed: int) -> RowValues:
    generator = torch.Generator().manual_seed(seed)
    tree: dict[str, torch.Tensor] = {}

    def adapt(name: str, weight: torch.Tensor) -> None:
        out, width = weight.shape
        tree[f"{name}.lora_A"] = 0.05 * torch.randn(_RANK, width, generator=generator)
        tree[f"{name}.lora_B"] = 0.05 * torch.randn(out, _RANK, generator=generator)

    lora = LoraSettings(_RANK, 2.0 * _RANK, 0.0, ("q_proj", "v_proj"))
    for path in find_targets(view, lora.targets)[0]:
        adapt(canonical(path), view.model.get_parameter(f"{path}.weight"))
    for layer in view.layers:
        for local, tensor in layer.expert_tensors(0).items():
            if tensor.ndim == 2:
                adapt(f"{layer.name}.graft.{local}", tensor)
        gate_D = 0.05 * torch.randn(layer.width, generator=generator)
        tree[f"{layer.name}.graft.gate.weight"] = gate_D
    return read_values(
        view,
        tree,
        lora=lora,
        graft=GraftSettings(rank=_RANK, alpha=2.0 * _RANK),
        graft_experts={layer.name: (seed % layer.num_experts,) for layer in view.layers},
        body="",
    )


if __name__ == "__main__":
    _serve_and_print_peak(sys.argv[1], int(sys.argv[2]))
