"""Run every measurement of this machine, one after another, and keep what each one printed.

    python -m benchmarks.kernels.run [--only step wire] [--model MODEL --data DOLLY.jsonl]
    python -m benchmarks.kernels.run --table

Each is ``orchard bench NAME --json``; its output and how long it took go to results/NAME.json, and
page and charts are made from these. --model and --data are for the measurements that take a model;
without, a random one is written for it, and what it gave goes to results/NAME-default.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from benchmarks.kernels.charts import draw_all
from benchmarks.kernels.report import HERE, page
from benchmarks.records import keep
from benchmarks.running import arguments_of
from orchard.measurements import BENCHES, TAKE_A_MODEL


def main() -> None:
    """Run what was asked for, then write the page and draw the charts."""
    given = arguments_of(__doc__, only=list(BENCHES)).parse_args()
    for name in () if given.table else given.only:
        command = [sys.executable, "-c", "from orchard.cli import main; main()", "bench", name]
        command.append("--json")
        kept_as = name
        if name in TAKE_A_MODEL and given.model:
            command += ["--model", given.model, "--data", given.data or ""]
        elif name in TAKE_A_MODEL:
            kept_as = f"{name}-default"
        started, load = time.monotonic(), os.getloadavg()[0]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - started
        found = {"seconds": round(seconds, 1), "load_before": round(load, 2)}
        keep(HERE / "results" / f"{kept_as}.json", {**found, **json.loads(done.stdout)})
        print(f"{name}: {seconds:.0f} s", flush=True)
    page().write()
    draw_all()


if __name__ == "__main__":
    main()
