"""Rounds of FLEx and HFedMoE on a model three times as large as the memory that they may use.

The experts are mapped. Every round is ``orchard run`` in a process of its own, whose private memory
the system limits (RLIMIT_DATA): a third of the bytes of the model. The same round in memory,
without a limit, has to end with the same digest.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchard.models.stored.loading import resolve
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint
from orchard.models.stored.tensors import open_checkpoint
from orchard.process_memory import anonymous_memory_bytes

_RECIPE = "tiny/flex"
_SAMPLE_SECONDS = 0.02
TIMES = 3
"""Bytes of the model over those of memory."""
COMMON = (
    *("data.max_tokens=64", "server.rounds=1", "server.clients_per_round=1"),
    *("client.batch_size=1", "client.steps=5", "server.keep_rounds=1"),
    *("evaluation.models=", "evaluation.retention_path=", "model.dtype=bfloat16"),
)
METHODS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "flex": (
            *("strategy.name=flex", "strategy.graft_choice=reconstruction"),
            *("strategy.calibration_blocks=1", "strategy.graft_kind=lora"),
            *("strategy.graft_rank=8", "model.lora_targets=attention", "model.lora_rank=8"),
        ),
        "hfedmoe": (
            *("strategy.name=hfedmoe", "selection.mode=mask", "selection.cadence=round"),
            *("selection.scoring_batches=1", "client.budget=25%", "model.lora_dropout=0"),
            *("model.lora_targets=attention,experts", "model.lora_rank=1"),
        ),
    }
)
"""What is run, by name: options beside ``COMMON``."""
SHAPE = Shape(layers=48, width=256, heads=4, experts=32, expert_width=1536, shared_width=256)


def bench_placement(
    *,
    repeats: int,
    shape: Shape = SHAPE,
    is_limited: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a model that is larger than the memory for it, and the same in memory.

    Args:
        repeats: Mapped runs of each method; peaks are the largest.
        shape: Of the random model.
        is_limited: Whether the system refuses more than a third of the model; a model that is small
            beside the libraries cannot be run so.
        say: Hears of every process that ended.

    Raises:
        RuntimeError: A run failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="orchard-placement-") as name:
        folder = Path(name)
        model = folder / "model"
        write_random_checkpoint(model, shape, dtype="bfloat16", seed=0)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(resolve("orchard:tiny")) / file, model)
        model_bytes = open_checkpoint(str(model)).num_bytes
        limit = model_bytes // TIMES
        found = {}
        for method in METHODS:
            options = [*COMMON, *METHODS[method], f"model.path={model}"]
            where = [*options, "model.placement=mapped"]
            runs = [
                run_round(where, folder / f"{method}{number}", limit=limit if is_limited else 0)
                for number in range(repeats)
            ]
            whole = run_round(options, folder / f"{method}-memory")
            peak = max(run["peak_anonymous_bytes"] for run in runs)
            predicted = predict_round(where)
            found[method] = {
                "peak_anonymous_bytes": peak,
                "predicted_anonymous_bytes": predicted,
                "predicted_over_measured": predicted / peak,
                "same_digest": {run["digest"] for run in runs} == {whole["digest"]},
                "seconds": sorted(run["seconds"] for run in runs)[repeats // 2],
                "bytes_read": max(run["bytes_read"] for run in runs),
                "in_memory": {key: whole[key] for key in ("peak_anonymous_bytes", "seconds")},
            }
            say(f"{method}: {peak / 1e9:.2f} GB of its own, {whole['seconds']:.0f} s in memory")
    peaks = [own["peak_anonymous_bytes"] for own in found.values()]
    ratios = [own["predicted_over_measured"] for own in found.values()]
    return {
        "model_bytes": model_bytes,
        "limit_bytes": limit if is_limited else None,
        "peak_anonymous_bytes": max(peaks),
        "predicted_over_measured": max(ratios, key=lambda ratio: abs(ratio - 1)),
        "same_digest": all(own["same_digest"] for own in found.values()),
        **found,
        "shape": asdict(shape),
        "repeats": repeats,
    }


def predict_round(options: list[str]) -> int:
    """Return what ``orchard plan`` says of the memory of the first client, without pages of files.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, "-m", "orchard", "plan", _RECIPE, *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a plan failed: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout)["clients"][0]["predicted_anonymous_bytes"])


def run_round(options: list[str], out: Path, *, limit: int = 0) -> dict[str, Any]:
    """Run a recipe in a process of its own, and return what it took.

    Args:
        options: Over the recipe of the packaged model.
        out: The run's folder.
        limit: Bytes of private memory that the process may have; 0 = any.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, "-m", "orchard", "run", _RECIPE, *options, "--out", str(out)]

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    start = time.perf_counter()
    log = out.with_name(f"{out.name}.log")
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, preexec_fn=limited)
        peak, num_read = sample(process)
    if process.returncode:
        raise RuntimeError(f"a measured run failed: {log.read_text().strip()[-500:]}")
    result = json.loads((out / "result.json").read_text())
    return {
        "seconds": time.perf_counter() - start,
        "peak_anonymous_bytes": peak,
        "bytes_read": num_read,
        "digest": (result["base_digest"], result["shared_digest"]),
    }


def sample(process: subprocess.Popen[Any]) -> tuple[int, int]:
    """Wait for a process, and return its largest anonymous memory and what it read from disk."""
    peak = num_read = 0
    about = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        try:
            peak = max(peak, anonymous_memory_bytes(about / "status"))
            counts = (about / "io").read_text()
        except OSError:  # it ended
            break
        for line in counts.splitlines():
            if line.startswith("read_bytes:"):
                num_read = int(line.split()[1])
        time.sleep(_SAMPLE_SECONDS)
    process.wait()
    return peak, num_read
