"""Measure whatever GPU is here, in one command, and say what was left out.

    make bench-gpu
    python -m benchmarks.gpu.run [--table]

On a GPU: a training step beside transformers and PEFT with grouped products, its memory, and what
choosing grafts over many layers takes, on random models of Qwen1.5-MoE's shape as large as fit.
Without one: that the grouped product computes what one product for each expert does, on this CPU;
all else is left out, and the page says so. Records go to results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import HERE, draw, page
from benchmarks.records import keep
from orchard.catalog import find_recipe
from orchard.communication.messages import LocalSettings, Task
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import build_clients, load_model
from orchard.measurements.step import bench_step
from orchard.measurements.step_sides import QWEN_SHAPE, StepCase
from orchard.models.kernels.frozen_experts import run_frozen
from orchard.models.kernels.grouped_experts import run_grouped
from orchard.models.kernels.routed_experts import FrozenWeights
from orchard.models.stored.loading import load_tokenizer
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint
from orchard.recipe.reading import read_recipe
from orchard.results import environment
from orchard.strategies.strategy import start_server, train_client

_LAYERS, _STEP_LAYERS = 24, 4
_LAYER_BYTES = 1.2e9
"""Of one layer of Qwen1.5-MoE in bfloat16, with what training it takes."""


def check_product(device: str) -> dict[str, Any]:
    """Compare one grouped product with one for each expert, values and gradients, in float32."""
    generator = torch.Generator().manual_seed(0)
    tokens, experts, width, hidden, choices = 256, 16, 64, 96, 4

    def draw_values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def activate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    weights = FrozenWeights(
        draw_values(experts, 2 * hidden, width),
        draw_values(experts, width, hidden),
        None,
        None,
        activate,
    )
    scores, chosen = draw_values(tokens, experts).topk(choices, dim=-1)
    x = draw_values(tokens, width)
    found = []
    for run in (run_frozen, run_grouped):
        own, scale = x.clone().requires_grad_(), scores.clone().requires_grad_()
        y = run(weights, own, chosen, scale)
        torch.autograd.backward(y, torch.ones_like(y))
        assert own.grad is not None
        assert scale.grad is not None
        found.append((y.detach(), own.grad, scale.grad))
    differences = [
        float((one - other).abs().max() / one.abs().max())
        for one, other in zip(*found, strict=True)
    ]
    return {"largest_relative_difference": max(differences), "dtype": "float32"}


def measure_step(*, repeats: int) -> dict[str, Any]:
    """Time a training step beside the peer's on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), QWEN_SHAPE, dtype="bfloat16", seed=0)
        case = StepCase(folder, "random", dtype="bfloat16", device="cuda", max_tokens=512)
        found = bench_step(case, repeats=repeats, experts=("grouped_mm", "eager"))
    peaks = found["device_peak_bytes"]
    return {**found, "peak_ratio": peaks["ours"] / peaks[found["peer"]]}


def measure_grafts() -> dict[str, Any]:
    """Time the first turn of a client of FLEx, which chooses a graft in every layer."""
    free = torch.cuda.mem_get_info()[0]
    layers = max(min(_LAYERS, int(free / _LAYER_BYTES) - 2), 1)
    shape: Shape = replace(QWEN_SHAPE, layers=layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(folder / "model", shape, dtype="bfloat16", seed=0)
        load_tokenizer("orchard:tiny").save_pretrained(folder / "model")
        overrides = [f"model.path={folder / 'model'}", "model.dtype=bfloat16", "model.device=cuda"]
        recipe = read_recipe(find_recipe(Path("tiny/flex")), [*overrides, "client.steps=1"]).recipe
        experiment = prepare_experiment(recipe)
        model = load_model(recipe, experiment.tokenizer)
        client, *_ = build_clients(experiment, model, folder / "clients")
        strategy = build_strategy(recipe, num_clients=len(experiment.train))
        shared = start_server(strategy, model.fresh).shared
        started = time.monotonic()
        update = train_client(strategy, client, Task(1, shared, LocalSettings(1, 0, 1e-4)))
        torch.cuda.synchronize()
        return {
            "layers": layers,
            "seconds_of_turn": time.monotonic() - started,
            "seconds_of_choice": update.metrics["client/prepare_seconds"],
        }


def main() -> None:
    """Measure what can be measured here, keep it, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only write the page")
    given = parser.parse_args()
    if not given.table:
        has_gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if has_gpu else ""
        found: dict[str, Any] = {
            **environment(),
            "device": device,
            "product": check_product("cuda" if has_gpu else "cpu"),
        }
        if has_gpu:
            found["step"] = measure_step(repeats=given.repeats)
            found["grafts"] = measure_grafts()
        else:
            found["left_out"] = ["step", "memory", "grafts"]
            print("no GPU is here: step, memory and grafts were left out")
        keep(HERE / "results" / ("gpu.json" if has_gpu else "without.json"), found)
        print(json.dumps(found, indent=1))
    page().write()
    draw()


if __name__ == "__main__":
    main()
