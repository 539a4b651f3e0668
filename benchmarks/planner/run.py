"""Compare the peak memory that the planner predicts with that of a process of its own.

    python -m benchmarks.planner.run [--model MODEL]
    python -m benchmarks.planner.run --table

Trains a few steps on random tokens in each way that a client can train, on a random model of 420
million parameters (written to a temporary folder) and, where --model is given, on that one. Keeps
results/cases.json, and writes page and table.md from it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.planner.report import RESULTS, page
from benchmarks.records import Record, keep
from benchmarks.running import arguments_of
from orchard.measurements.client_memory import Case, measure, predict
from orchard.models.stored.loading import check_model
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint
from orchard.results import environment

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# What is trained itself, and what gets adapters.
TRAINED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "everything": (("all",), ()),
    "adapters on attention": ((), ATTENTION),
    "adapters, experts too": ((), (*ATTENTION, "router", "experts")),
}


def cases(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield what is trained, and the case, for each way to train."""
    num_experts = check_model(case.path, case.lora).layers[0].num_experts
    for name, (full, lora) in TRAINED.items():
        own = replace(case, full_targets=full, lora_targets=lora)
        yield name, own
        if name == "adapters on attention":
            continue
        for mode in ("mask", "carve"):
            yield name, replace(own, mode=mode, experts=num_experts // 4)
        yield name, replace(own, mode="carve", experts=num_experts // 2)
    yield name, replace(own, dtype="bfloat16")


def main() -> None:
    """Measure every case, keep what was found, and write the page."""
    given = arguments_of(__doc__).parse_args()
    if not given.table:
        keep(RESULTS, {**environment(), "cases": list(_measure(given.model))})
    page().write()


def _measure(own_model: str | None) -> Iterator[Record]:
    """Yield every case with its measured and predicted peak."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), Shape(), dtype="bfloat16", seed=0)
        models = {"random, 420 M": Case(folder, steps=2, num_threads=1)}
        if own_model:
            own = Case(own_model, steps=2, num_threads=1, num_tokens=256)
            models[Path(own_model).name] = own
        for model, base in models.items():
            for trained, case in cases(base):
                measured = measure(case)["peak_memory_bytes"]
                predicted = predict(case).total
                experts = str(case.experts) if case.experts else "all"
                found = {
                    "model": model,
                    "trains": trained,
                    "held": experts if case.mode == "carve" else "all",
                    "trained_per_layer": experts,
                    "dtype": case.dtype,
                    "measured_bytes": measured,
                    "predicted_bytes": predicted,
                    "ratio": predicted / measured,
                }
                print(found, flush=True)
                yield found


if __name__ == "__main__":
    main()
