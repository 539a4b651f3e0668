"""Run every method on FLEx's four-client Dolly setting and write the table.

    python benchmarks/flex_table1/run.py --model MODEL --data DOLLY.jsonl [--only flex fedavg]
    python benchmarks/flex_table1/run.py --table

Each run goes to runs/flex_table1/<recipe> (a finished or interrupted one is continued); its
result.json is copied to results/ here, and table.md is written from those copies alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPES = (
    "flex",
    "fedavg",
    "local",
    "flex_closed",
    "fedavgm",
    "fedprox",
    "scaffold",
    "fedadam",
    "fedadagrad",
    "fedyogi",
    "flex_random",
    "flex_no_gate",
)
MODELS = ("base", "global", "local", "personal")


def run(recipe: str, *, model: str, data: str) -> None:
    """Run one recipe by the command line and keep its result."""
    out = Path("runs") / "flex_table1" / recipe
    command = [
        *(sys.executable, "-c", "from orchard.cli import main; main()", "run"),
        f"recipes/dolly/{recipe}.toml",
        f"model.path={model}",
        f"data.path={data}",
        # The base is the same for all: it is evaluated once, with the first recipe.
        *([] if recipe == RECIPES[0] else ["evaluation.models=global,local,personal"]),
        *("--out", str(out), "--resume"),
    ]
    subprocess.run(command, check=True)
    (HERE / "results").mkdir(exist_ok=True)
    shutil.copy(out / "result.json", HERE / "results" / f"{recipe}.json")


def write_table() -> None:
    """Write table.md from the results that are here."""
    results = {
        recipe: json.loads((HERE / "results" / f"{recipe}.json").read_text())
        for recipe in RECIPES
        if (HERE / "results" / f"{recipe}.json").is_file()
    }
    lines: list[str] = []
    for metric, scale, digits in (("rouge_l", 100, 2), ("loss", 1, 3)):
        lines += ["", f"## {metric}", ""]
        clients = list(next(iter(results.values()))["clients"])
        columns = ["recipe", "model", *clients, "mean", "worst"]
        lines += [_row(columns), _row(["---", "---", *["---:"] * (len(columns) - 2)])]
        base = next(iter(results.values()))
        lines.append(_metric_row("(no training)", "base", base, metric, scale, digits))
        for recipe, result in results.items():
            for model in MODELS[1:]:
                lines.append(_metric_row(recipe, model, result, metric, scale, digits))
    lines += ["", "## cost", ""]
    columns = ["recipe", "uplink B per client and round", "s in all", "s overhead", "overhead %"]
    lines += [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for recipe, result in results.items():
        uplink = result["uplink_bytes_per_round"]
        seconds = result["seconds"]
        lines.append(
            _row(
                [
                    recipe,
                    f"{sum(uplink) / len(uplink) / len(result['clients']):,.0f}",
                    f"{seconds['rounds']:.0f}",
                    f"{seconds['overhead']:.1f}",
                    f"{100 * result['overhead_share']:.1f}",
                ]
            )
        )
    (HERE / "table.md").write_text("\n".join(lines).strip() + "\n")


def _metric_row(
    recipe: str, model: str, result: dict[str, Any], metric: str, scale: int, digits: int
) -> str:
    values = result["metrics"][model][metric]
    summary = result["summary"][model][metric]
    numbers = [*values.values(), summary["mean"], summary["worst"]]
    return _row([recipe, model, *(f"{scale * number:.{digits}f}" for number in numbers)])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what was asked for, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if not arguments.table:
        for recipe in arguments.only:
            run(recipe, model=arguments.model, data=arguments.data)
    write_table()


if __name__ == "__main__":
    main()
