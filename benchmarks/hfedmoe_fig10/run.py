"""Run HFedMoE and what it is compared with on AG News, half of the clients constrained.

    python benchmarks/hfedmoe_fig10/run.py --model MODEL --data AG_NEWS.jsonl [--seeds 0 1 2]
        [--only hfedmoe fedavg_dropout] [--jobs 2]
    python benchmarks/hfedmoe_fig10/run.py --table

Each run goes to runs/hfedmoe_fig10/<recipe>-<seed> (a finished or interrupted one is continued);
what the table needs of its log is kept in results/ here, and table.md is written from those files
alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).parent
EVERY = 2  # rounds between evaluations
RECIPES = (
    "fedavg",
    "fedavg_dropout",
    "hfedmoe",
    "hfedmoe_trained",
    "hfedmoe_carved",
    "fedavg_random",
    "pflmoe",
    "fedmoe",
    "seermoe",
)


def run(recipe: str, seed: int, *, model: str, data: str) -> None:
    """Run one recipe with one seed by the command line and keep what the table needs."""
    out = Path("runs") / "hfedmoe_fig10" / f"{recipe}-{seed}"
    command = [
        *(sys.executable, "-c", "from orchard.cli import main; main()", "run"),
        f"recipes/ag_news/{recipe}.toml",
        *(f"model.path={model}", f"data.path={data}", f"seed={seed}", f"evaluation.every={EVERY}"),
        *("--out", str(out), "--resume"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.with_name(f"{out.name}.log")).open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    kept = summarize(out)
    (HERE / "results").mkdir(exist_ok=True)
    text = json.dumps({"recipe": recipe, "seed": seed, **kept}, indent=1)
    (HERE / "results" / f"{recipe}-{seed}.json").write_text(text + "\n")


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


def write_table() -> None:
    """Write table.md from the results that are here."""
    results: dict[str, list[dict[str, Any]]] = {}
    for recipe in RECIPES:
        found = sorted((HERE / "results").glob(f"{recipe}-[0-9]*.json"))
        if found:
            results[recipe] = [json.loads(path.read_text()) for path in found]
    best = {
        reference: {r["seed"]: max(_curve(r).values()) for r in results.get(reference, [])}
        for reference in ("fedavg", "fedavg_dropout")
    }
    columns = [
        "recipe",
        "seeds",
        "final accuracy, % (spread over seeds)",
        "each seed",
        "best, %",
        "rounds to FedAvg's best",
        "rounds to drop-out's best",
        "active share, %",
        "pass rate, %",
        "frozen experts at the end",
        "uplink, MB a round",
        "training, s",
    ]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for recipe, runs in results.items():
        finals = [100 * list(_curve(r).values())[-1] for r in runs]
        spread = f" ± {stdev(finals):.1f}" if len(finals) > 1 else ""
        lines.append(
            _row(
                [
                    recipe,
                    str(len(runs)),
                    f"{fmean(finals):.1f}{spread}",
                    " ".join(f"{final:.1f}" for final in finals),
                    f"{fmean(100 * max(_curve(r).values()) for r in runs):.1f}",
                    _rounds_to(runs, best["fedavg"]),
                    _rounds_to(runs, best["fedavg_dropout"]),
                    _mean(runs, "active_share", 100),
                    _mean(runs, "pass_rate", 100),
                    f"{fmean(r['frozen'][-1] for r in runs):.0f}",
                    _mean(runs, "uplink_bytes", 1e-6),
                    f"{fmean(r['train_seconds'] for r in runs):.0f}",
                ]
            )
        )
    errors = [r["accuracy_stderr"] for runs in results.values() for r in runs]
    note = (
        f"Accuracy of the global model on one central test set; its standard error is at most "
        f"{100 * max(errors):.1f} points in one run."
    )
    (HERE / "table.md").write_text("\n".join([*lines, "", note]) + "\n")


def _curve(result: dict[str, Any]) -> dict[int, float]:
    """Return round to accuracy, in order."""
    return {int(number): value for number, value in result["accuracy_by_round"].items()}


def _rounds_to(runs: Sequence[dict[str, Any]], targets: dict[int, float]) -> str:
    """Return the first round at or above each seed's target; a dash where it is never reached."""
    if not targets:
        return ""
    found = []
    for own in runs:
        curve, target = _curve(own), targets.get(own["seed"])
        reached = [n for n, value in curve.items() if target is not None and value >= target]
        found.append(str(reached[0]) if reached else "-")
    return " ".join(found)


def _mean(runs: Sequence[dict[str, Any]], name: str, scale: float) -> str:
    values = [value for own in runs for value in own[name] if value is not None]
    return f"{scale * fmean(values):.1f}" if values else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what was asked for, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if not arguments.table:
        (Path("runs") / "hfedmoe_fig10").mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            pending = [
                pool.submit(run, recipe, seed, model=arguments.model, data=arguments.data)
                for seed in arguments.seeds
                for recipe in arguments.only
            ]
            for one in pending:
                one.result()
    write_table()


if __name__ == "__main__":
    main()
