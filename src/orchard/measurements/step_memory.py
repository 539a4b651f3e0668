"""The memory of each side of ``step``, alone in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

from orchard.measurements.step_sides import (
    OurSide,
    StepCase,
    plain_batches,
    plain_side,
    read_examples,
)
from orchard.models.stored.loading import load_tokenizer, threads
from orchard.process_memory import forget_peak_memory, peak_memory_bytes


def measure_alone(case: StepCase, side: str) -> dict[str, float]:
    """Train one side in a process of its own and return its memory; see ``train_alone``.

    Raises:
        RuntimeError: The process failed; with the end of what it wrote.
    """
    about = json.dumps({"side": side, **asdict(case)})
    command = [sys.executable, "-m", "orchard.measurements.step_memory", about]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measured side failed: {done.stderr.strip()[-500:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def train_alone(case: StepCase, side: str) -> dict[str, float]:
    """Train one side in this process and return its memory.

    Returns:
        ``imported_bytes`` before anything is loaded, ``loaded_bytes`` with the model,
        ``peak_bytes`` of the whole process, and ``training_bytes``, the peak while it trains beyond
        what was resident with the model loaded.
    """
    imported = peak_memory_bytes()
    with threads(case.num_threads):
        if side.startswith("ours"):
            ours = OurSide(case)
            values = ours.model.read(ours.model.adapter_names)
            examples = read_examples(case, ours.model.tokenizer)
        else:
            plain = plain_side(case, side)
            tokenizer = None if case.data == "random" else load_tokenizer(case.path)
            batches = plain_batches(case, read_examples(case, tokenizer))
        loading_peak = peak_memory_bytes()
        forget_peak_memory()
        loaded = peak_memory_bytes()
        if side.startswith("ours"):
            ours.train(examples, values, packed=side == "ours")
        else:
            plain.train(batches)
    training_peak = peak_memory_bytes()
    return {
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "peak_bytes": max(loading_peak, training_peak),
        "training_bytes": training_peak - loaded,
    }


def main(arguments: Sequence[str]) -> None:
    """Measure the one side that is given as JSON, and print what was found as JSON."""
    about = json.loads(arguments[0])
    side = about.pop("side")
    about["targets"] = tuple(about["targets"])
    print(json.dumps(train_alone(StepCase(**about), side)))


if __name__ == "__main__":
    main(sys.argv[1:])
