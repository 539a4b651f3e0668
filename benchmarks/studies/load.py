"""Count expert load in the runs of a study, for results/flex_load: nothing trains anew.

    python -m benchmarks.studies.load runs/flex_table1 --data WIKINEWS.jsonl [--methods fedavg flex]
        [--max-texts 40] [--max-tokens 256]

Of every run of these methods in the study's tables, ``orchard load --json`` counts base and global
model, and the personal one of the first client. Give text that nobody trained on. What is counted
already is left as it is; ``python scripts/make_results.py`` writes the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.studies.questions import RESULTS
from orchard.results import write_json

QUESTION = "flex_load"


def runs_of(study: Path, methods: Sequence[str]) -> Iterator[tuple[str, str, int, Path]]:
    """Yield combination of the grid, method, seed and folder of the runs of a study's table.

    Raises:
        ValueError: The study has no run of a method.
    """
    record = json.loads((study / "study.json").read_text(encoding="utf-8"))
    known = {column["method"] for column in record["columns"]}
    if missing := [method for method in methods if method not in known]:
        raise ValueError(
            f"--methods must be of {', '.join(sorted(known))}, got {', '.join(missing)}; name some"
        )
    for column in record["columns"]:
        if column["method"] in methods:
            for run in column["runs"]:
                folder = study / "runs" / run["folder"]
                yield column["cell"], column["method"], run["seed"], folder


def count(run: Path, *, data: str, max_texts: int, max_tokens: int) -> dict[str, object]:
    """Return what ``orchard load`` counts of a run.

    Raises:
        CalledProcessError: It cannot.
    """
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    clients = [name for name, number in result["parameters"]["private"].items() if number]
    command = [
        *(sys.executable, "-c", "from orchard.cli import main; main()", "load", str(run)),
        *("--data", data, "--json", "--max-texts", str(max_texts)),
        *("--max-tokens", str(max_tokens)),
        *(("--client", clients[0]) if clients else ()),
    ]
    found: dict[str, object] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    return found


def main() -> None:
    """Count what is not counted yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", type=Path, help="folder of a study, with its runs")
    parser.add_argument("--data", required=True, help="text: rows with a column text, or a .txt")
    parser.add_argument("--methods", nargs="+", default=["fedavg", "flex"])
    parser.add_argument("--max-texts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=256)
    given = parser.parse_args()
    try:
        runs = list(runs_of(given.study, given.methods))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for cell, method, seed, folder in runs:
        name = "-".join(part for part in (method, cell, str(seed)) if part)
        kept = RESULTS / QUESTION / f"load-{''.join(c if c.isalnum() else '-' for c in name)}.json"
        if kept.exists():
            continue
        found = count(
            folder, data=given.data, max_texts=given.max_texts, max_tokens=given.max_tokens
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        # The study's name of a method, which tells apart what one strategy is called twice.
        write_json(kept, {**found, "method": method})
        print(f"counted {kept.name}", flush=True)


if __name__ == "__main__":
    main()
