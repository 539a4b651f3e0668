"""Train with what the wire loses: Dolly, one category each, in several encodings and seeds.

    python benchmarks/wire/run.py --model MODEL --data DOLLY.jsonl [--seeds 0 1 2] [--only int8]
    python benchmarks/wire/run.py --table

Each run goes to runs/wire/<encoding>_<seed>, and an interrupted one is continued; what the table
needs of it is kept in results/ here, and table.md is written from those files alone. A run whose
result is there is not run again. All encodings of a seed come before the next seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).parent
REFERENCE = "bfloat16"
ENCODINGS = {
    "bfloat16": ("communication.dtype=bfloat16",),
    "int8": ("communication.dtype=int8",),
    "int8, no feedback": ("communication.dtype=int8", "communication.feedback=false"),
    "int8, differences down": ("communication.dtype=int8", "communication.downlink=differences"),
    "top 10 %": ("communication.top_k=0.1", "communication.dtype=bfloat16"),
    "top 10 %, int8": ("communication.top_k=0.1", "communication.dtype=int8"),
    "top 10 %, no feedback": (
        "communication.top_k=0.1",
        "communication.dtype=bfloat16",
        "communication.feedback=false",
    ),
}
# Of the recipe, what makes a run two minutes on one thread.
QUICK = ("model.dtype=float32", "model.num_threads=1", "data.max_tokens=256", "server.rounds=12")


def result_path(encoding: str, seed: int) -> Path:
    """Return where a run's result is kept."""
    name = "".join(c if c.isalnum() else "_" for c in f"{encoding}-{seed}")
    return HERE / "results" / f"{name}.json"


def run(encoding: str, seed: int, *, model: str, data: str) -> None:
    """Run one encoding with one seed by the command line and keep what the table needs."""
    name = result_path(encoding, seed).stem
    out = Path("runs") / "wire" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-c", "from orchard.cli import main; main()", "run"),
        "recipes/dolly/fedavg.toml",
        *(f"model.path={model}", f"data.path={data}", f"seed={seed}", *QUICK),
        *("evaluation.models=global", "evaluation.metrics=loss", *ENCODINGS[encoding]),
        *("--out", str(out), "--resume"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with out.with_name(f"{name}.log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    record = json.loads((out / "result.json").read_text())
    clients = len(record["clients"])
    kept = {
        "encoding": encoding,
        "seed": seed,
        "loss": record["summary"]["global"]["loss"]["mean"],
        "train_loss_per_round": record["train_loss_per_round"],
        # Of the last round: the first sends whole values whatever the encoding.
        "uplink_bytes_per_client": record["uplink_bytes_per_round"][-1] / clients,
        "downlink_bytes_per_client": record["downlink_bytes_per_round"][-1] / clients,
        "overhead_seconds": record["seconds"]["overhead"],
    }
    (HERE / "results").mkdir(exist_ok=True)
    result_path(encoding, seed).write_text(json.dumps(kept, indent=1) + "\n")


def write_table() -> None:
    """Write table.md from the results that are here."""
    found = [json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")]
    by_seed = {r["seed"]: r["loss"] for r in found if r["encoding"] == REFERENCE}
    columns = (
        *("encoding", "seeds", "final loss (spread over seeds)", "each seed"),
        *("minus bfloat16, seed by seed", "up, kB", "down, kB"),
    )
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for encoding in ENCODINGS:
        runs = sorted((r for r in found if r["encoding"] == encoding), key=lambda r: r["seed"])
        if runs:
            lines.append(_encoding_row(encoding, runs, by_seed))
    (HERE / "table.md").write_text("\n".join(lines) + "\n")


def _encoding_row(
    encoding: str, runs: Sequence[dict[str, Any]], reference: dict[int, float]
) -> str:
    losses = [r["loss"] for r in runs]
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    shifts = [r["loss"] - reference[r["seed"]] for r in runs if r["seed"] in reference]
    return _row(
        [
            encoding,
            str(len(runs)),
            f"{fmean(losses):.4f}{spread}",
            " ".join(f"{loss:.4f}" for loss in losses),
            " ".join(f"{shift:+.5f}" for shift in shifts),
            f"{fmean(r['uplink_bytes_per_client'] for r in runs) / 1e3:.1f}",
            f"{fmean(r['downlink_bytes_per_client'] for r in runs) / 1e3:.1f}",
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what was asked for, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=list(ENCODINGS), choices=list(ENCODINGS))
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if not arguments.table:
        for seed in arguments.seeds:
            for encoding in arguments.only:
                if not result_path(encoding, seed).exists():
                    run(encoding, seed, model=arguments.model, data=arguments.data)
    write_table()


if __name__ == "__main__":
    main()
