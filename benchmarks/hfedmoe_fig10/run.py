"""Run HFedMoE and what it is compared with on AG News, half of the clients constrained.

    python -m benchmarks.hfedmoe_fig10.run --model MODEL --data AG_NEWS.jsonl [--seeds 0 1 2]
        [--only hfedmoe fedavg_dropout] [--jobs 2]
    python -m benchmarks.hfedmoe_fig10.run --table

Each run goes to runs/hfedmoe_fig10/<recipe>-<seed> (a finished or interrupted one is continued);
what the page needs of its log is kept in results/ here, and page and table.md are written from
those files alone.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.hfedmoe_fig10.report import EVERY, HERE, RECIPES, page
from benchmarks.records import keep, origin
from benchmarks.running import arguments_of, run_recipe


def run(recipe: str, seed: int, *, model: str, data: str) -> None:
    """Run one recipe with one seed and keep what the page needs."""
    out = Path("runs") / "hfedmoe_fig10" / f"{recipe}-{seed}"
    settings = (f"model.path={model}", f"data.path={data}", f"seed={seed}")
    run_recipe(f"ag_news/{recipe}", [*settings, f"evaluation.every={EVERY}"], out=out)
    result = json.loads((out / "result.json").read_text())
    kept = {**origin(result), "recipe": recipe, "seed": seed, **summarize(out)}
    keep(HERE / "results" / f"{recipe}-{seed}.json", kept)


def summarize(folder: Path) -> dict[str, Any]:
    """Return the global model's accuracy by round and what the rounds moved."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    curve = {}
    for line in lines:
        if line["kind"] == "evaluation":
            values: dict[str, float] = next(iter(line["clients"].values()))
            kind = "base" if "base/accuracy" in values else "global"
            curve[line["round"]] = values[f"{kind}/accuracy"]
            error = values[f"{kind}/accuracy_stderr"]
    return {
        "accuracy_by_round": {n: curve[n] for n in sorted(curve) if n % EVERY == 0},
        "accuracy_stderr": error,
        **{
            name.removeprefix("experts/"): [line.get(name) for line in rounds]
            for name in (
                "experts/active_share",
                "experts/pass_rate",
                "experts/moved_share",
                "experts/frozen",
                "experts/alpha_sum",
            )
        },
        "num_clients": [line["round/num_clients"] for line in rounds],
        "uplink_bytes": [line["round/uplink_bytes"] for line in rounds],
        # A client that carves chooses and loads before it trains; others choose step by step.
        "train_seconds": math.fsum(
            line["round/train_seconds"] + line["round/prepare_seconds"] for line in rounds
        ),
    }


def main() -> None:
    """Run what was asked for, then write the page."""
    parser = arguments_of(__doc__, only=RECIPES, seeds=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    given = parser.parse_args()
    with ThreadPoolExecutor(given.jobs) as pool:
        pending = [
            pool.submit(run, recipe, seed, model=given.model, data=given.data)
            for seed in (() if given.table else given.seeds)
            for recipe in given.only
        ]
        for one in pending:
            one.result()
    page().write()


if __name__ == "__main__":
    main()
