"""Train with what the wire loses: Dolly, one category each, in several encodings and seeds.

    python -m benchmarks.wire.run --model MODEL --data DOLLY.jsonl [--seeds 0 1 2] [--only int8]
    python -m benchmarks.wire.run --table

Each run goes to runs/wire/<encoding>_<seed>, and an interrupted one is continued; what the page
needs of it is kept in results/ here, and the page is written from those files alone. A run whose
result is there is not run again. All encodings of a seed come before the next seed.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.records import keep, origin
from benchmarks.running import arguments_of, run_recipe
from benchmarks.wire.report import ENCODINGS, HERE, page

# Of the recipe, what makes a run short on one thread.
QUICK = ("model.dtype=float32", "model.num_threads=1", "data.max_tokens=256", "server.rounds=12")


def result_path(encoding: str, seed: int) -> Path:
    """Return where a run's result is kept."""
    name = "".join(c if c.isalnum() else "_" for c in f"{encoding}-{seed}")
    return HERE / "results" / f"{name}.json"


def run(encoding: str, seed: int, *, model: str, data: str) -> None:
    """Run one encoding with one seed and keep what the page needs."""
    out = Path("runs") / "wire" / result_path(encoding, seed).stem
    run_recipe(
        "dolly/fedavg",
        [
            *(f"model.path={model}", f"data.path={data}", f"seed={seed}", *QUICK),
            *("evaluation.models=global", "evaluation.metrics=loss", *ENCODINGS[encoding]),
        ],
        out=out,
    )
    record = json.loads((out / "result.json").read_text())
    clients = len(record["clients"])
    kept = {
        **origin(record),
        "encoding": encoding,
        "seed": seed,
        "loss": record["summary"]["global"]["loss"]["mean"],
        "train_loss_per_round": record["train_loss_per_round"],
        # Of the last round: the first sends whole values whatever the encoding.
        "uplink_bytes_per_client": record["uplink_bytes_per_round"][-1] / clients,
        "downlink_bytes_per_client": record["downlink_bytes_per_round"][-1] / clients,
        "overhead_seconds": record["seconds"]["overhead"],
    }
    keep(result_path(encoding, seed), kept)


def main() -> None:
    """Run what was asked for, then write the page."""
    given = arguments_of(__doc__, only=list(ENCODINGS), seeds=(0, 1, 2)).parse_args()
    for seed in () if given.table else given.seeds:
        for encoding in given.only:
            if not result_path(encoding, seed).exists():
                run(encoding, seed, model=given.model, data=given.data)
    page().write()


if __name__ == "__main__":
    main()
