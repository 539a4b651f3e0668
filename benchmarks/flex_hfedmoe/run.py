"""Run FLEx and HFedMoE joined, each alone, and what they are compared with, on pathological Dolly.

    python benchmarks/flex_hfedmoe/run.py --model MODEL --data DOLLY.jsonl [--seeds 0 1 2]
        [--only flex_hfedmoe hfedmoe]
    python benchmarks/flex_hfedmoe/run.py --table

Every run takes place with the first seed before any with the next. Each goes to
runs/flex_hfedmoe/<run>-<seed> (a finished or interrupted one is continued); what the table needs of
it is kept in results/ here, and table.md is written from those files alone. Models are float32 for
all, which on a CPU trains three times as fast as bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

HERE = Path(__file__).parent
# Adapters of hfedmoe.toml; PEFT has no dropout where experts have adapters.
SAME_NAMES = ("model.lora_targets=q_proj,k_proj,v_proj,router,experts", "model.lora_dropout=0.0")
RUNS = {
    "flex_hfedmoe": ("flex_hfedmoe", ()),
    "hfedmoe": ("hfedmoe", ("client.budget=50%",)),
    "fedavg": ("fedavg", SAME_NAMES),
    "flex": ("flex", ()),
    "local": ("local", SAME_NAMES),
    "flex_same_names": ("flex", SAME_NAMES),
    "flex_hfedmoe_closed": ("flex_hfedmoe", ("strategy.graft_gate=closed",)),
}
MODELS = ("global", "personal")
METRICS = ("loss", "rouge_l")


def run(name: str, seed: int, *, model: str, data: str) -> None:
    """Run one recipe with one seed by the command line and keep what the table needs."""
    recipe, overrides = RUNS[name]
    out = Path("runs") / "flex_hfedmoe" / f"{name}-{seed}"
    command = [
        *(sys.executable, "-c", "from orchard.cli import main; main()", "run"),
        f"recipes/dolly/{recipe}.toml",
        *(f"model.path={model}", f"data.path={data}", f"seed={seed}", *overrides),
        *("model.dtype=float32", f"evaluation.models={','.join(MODELS)}"),
        *("--out", str(out), "--resume"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (out.with_name(f"{out.name}.log")).open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    kept = summarize(out)
    (HERE / "results").mkdir(exist_ok=True)
    text = json.dumps({"run": name, "recipe": recipe, "seed": seed, **kept}, indent=1)
    (HERE / "results" / f"{name}-{seed}.json").write_text(text + "\n")


def summarize(folder: Path) -> dict[str, Any]:
    """Return the metrics of every client, what clients trained, and what the rounds moved."""
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    return {
        "commit": result["commit"],
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


def write_table() -> None:
    """Write table.md from the results that are here."""
    columns = [
        "run",
        "seeds",
        *(f"{model} {metric}" for metric in ("loss", "ROUGE-L, %") for model in MODELS),
        "active share, %",
        "uplink, MB per client and round",
        "training, s",
    ]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for name in RUNS:
        found = sorted((HERE / "results").glob(f"{name}-[0-9]*.json"))
        runs = [json.loads(path.read_text()) for path in found]
        if not runs:
            continue
        active = [share for own in runs for share in own["active_share"] if share is not None]
        uplink = [
            num_bytes / clients
            for own in runs
            for num_bytes, clients in zip(own["uplink_bytes"], own["num_clients"], strict=True)
        ]
        lines.append(
            _row(
                [
                    name,
                    " ".join(str(own["seed"]) for own in runs),
                    *(_cell(runs, model, "loss", 1, 3) for model in MODELS),
                    *(_cell(runs, model, "rouge_l", 100, 2) for model in MODELS),
                    f"{100 * fmean(active):.1f}" if active else "",
                    f"{1e-6 * fmean(uplink):.2f}",
                    f"{fmean(own['train_seconds'] for own in runs):.0f}",
                ]
            )
        )
    note = (
        "Mean over four clients of each client's own test examples; ± is the standard deviation "
        "over seeds, where there are several."
    )
    (HERE / "table.md").write_text("\n".join([*lines, "", note]) + "\n")


def _cell(
    runs: Sequence[dict[str, Any]], model: str, metric: str, scale: float, digits: int
) -> str:
    values = [scale * fmean(own["metrics"][model][metric].values()) for own in runs]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what was asked for, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if not arguments.table:
        (Path("runs") / "flex_hfedmoe").mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            for name in arguments.only:
                run(name, seed, model=arguments.model, data=arguments.data)
    write_table()


if __name__ == "__main__":
    main()
