"""Run FLEx and HFedMoE joined, each alone, and what they are compared with, on pathological Dolly.

    python -m benchmarks.flex_hfedmoe.run --model MODEL --data DOLLY.jsonl [--seeds 0 1 2]
        [--only flex_hfedmoe hfedmoe]
    python -m benchmarks.flex_hfedmoe.run --table

Every run takes place with the first seed before any with the next. Each goes to
runs/flex_hfedmoe/<run>-<seed> (a finished or interrupted one is continued); what the page needs of
it is kept in results/ here, and page and table.md are written from those files alone. Models are
float32 for all, which CPUs without bfloat16 instructions train faster than bfloat16.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.flex_hfedmoe.report import HERE, METRICS, MODELS, RUNS, page
from benchmarks.records import keep, origin
from benchmarks.running import arguments_of, run_recipe


def run(name: str, seed: int, *, model: str, data: str) -> None:
    """Run one recipe with one seed and keep what the page needs."""
    recipe, overrides = RUNS[name]
    out = Path("runs") / "flex_hfedmoe" / f"{name}-{seed}"
    run_recipe(
        f"dolly/{recipe}",
        [
            *(f"model.path={model}", f"data.path={data}", f"seed={seed}", *overrides),
            *("model.dtype=float32", f"evaluation.models={','.join(MODELS)}"),
        ],
        out=out,
    )
    kept = {"run": name, "recipe": recipe, "seed": seed, **summarize(out)}
    keep(HERE / "results" / f"{name}-{seed}.json", kept)


def summarize(folder: Path) -> dict[str, Any]:
    """Return the metrics of every client, what clients trained, and what the rounds moved."""
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    return {
        **origin(result),
        "metrics": {
            model: {metric: result["metrics"][model][metric] for metric in METRICS}
            for model in MODELS
        },
        "active_share": [line.get("experts/active_share") for line in rounds],
        "num_clients": [line["round/num_clients"] for line in rounds],
        "uplink_bytes": [line["round/uplink_bytes"] for line in rounds],
        "train_loss": result["train_loss_per_round"],
        "train_seconds": math.fsum(line["round/train_seconds"] for line in rounds),
        "seconds": result["seconds"],
    }


def main() -> None:
    """Run what was asked for, then write the page."""
    given = arguments_of(__doc__, only=list(RUNS), seeds=(0, 1, 2)).parse_args()
    for seed in () if given.table else given.seeds:
        for name in given.only:
            run(name, seed, model=given.model, data=given.data)
    page().write()


if __name__ == "__main__":
    main()
