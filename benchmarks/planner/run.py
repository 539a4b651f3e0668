"""Compare the peak memory that the planner predicts with that of a process of its own.

    python benchmarks/planner/run.py [--model MODEL]

Trains a few steps on random tokens in each way that a client can train, on a random model of 420
million parameters (written to a temporary folder) and, where --model is given, on that one. Writes
table.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from orchard.measurements.client_memory import Case, measure, predict
from orchard.models.stored.loading import check_model
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint

HERE = Path(__file__).parent
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
COLUMNS = (
    *("model", "trains", "clients hold", "experts trained a layer", "base"),
    *("measured, GB", "predicted, GB", "predicted / measured"),
)
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


def row(cells: list[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    arguments = parser.parse_args()
    lines = [row(list(COLUMNS)), row(["---"] * 5 + ["---:"] * 3)]
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder), Shape(), dtype="bfloat16", seed=0)
        models = {"random, 420 M": Case(folder, steps=2, num_threads=1)}
        if arguments.model:
            own = Case(arguments.model, steps=2, num_threads=1, num_tokens=256)
            models[Path(arguments.model).name] = own
        for model, base in models.items():
            for trained, case in cases(base):
                found = measure(case)["peak_memory_bytes"]
                predicted = predict(case).total
                ratios.append(predicted / found)
                experts = str(case.experts) if case.experts else "all"
                held = experts if case.mode == "carve" else "all"
                cells = [model, trained, held, experts, case.dtype]
                cells += [f"{found / 1e9:.2f}", f"{predicted / 1e9:.2f}", f"{ratios[-1]:.3f}"]
                lines.append(row(cells))
                print(lines[-1], flush=True)
    note = (
        f"Predicted over measured is between {min(ratios):.3f} and {max(ratios):.3f}. Batches of 8 "
        "rows, 128 tokens each for the random model and 256 for the other."
    )
    (HERE / "table.md").write_text("\n".join([*lines, "", note]) + "\n")


if __name__ == "__main__":
    main()
