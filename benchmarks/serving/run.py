"""Measure serving on bases, one after another, and keep what each measurement printed.

    python -m benchmarks.serving.run --model MODEL [--seconds 60] [--repeats 3]
    python -m benchmarks.serving.run --table

Each is ``orchard bench serve --json``; its output and how busy the machine was go to
results/NAME.json, where the name is the model's, and the page is made from these.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from benchmarks.records import keep
from benchmarks.serving.report import HERE, page


def main() -> None:
    """Measure what was asked for, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", default=[], help="a base; may be repeated")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long a server is loaded")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--table", action="store_true", help="write the page alone")
    given = parser.parse_args()
    for model in () if given.table else given.model:
        command = [sys.executable, "-c", "from orchard.cli import main; main()", "bench", "serve"]
        options = ["--seconds", str(given.seconds), "--repeats", str(given.repeats)]
        started, load = time.monotonic(), os.getloadavg()[0]
        done = subprocess.run(
            [*command, "--json", "--model", model, *options],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds = time.monotonic() - started
        found = json.loads(done.stdout)
        about = {
            "seconds": round(seconds, 1),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
        }
        name = str(found["model"]).replace("orchard:", "")
        keep(HERE / "results" / f"{name}.json", {**about, **found})
        print(f"{name}: {seconds:.0f} s", flush=True)
    page().write()


if __name__ == "__main__":
    main()
