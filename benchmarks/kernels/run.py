"""Run every measurement of this machine, one after another, and keep what each one printed.

    python benchmarks/kernels/run.py [--only step wire] [--model MODEL --data DOLLY.jsonl]

Each is ``orchard bench NAME --json``; its output and how long it took go to results/NAME.json.
--model and --data are for the measurements that take a model; without, the packaged one is used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from orchard.measurements import BENCHES, TAKE_A_MODEL

HERE = Path(__file__).parent


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(BENCHES), choices=list(BENCHES))
    parser.add_argument("--model", default="")
    parser.add_argument("--data", default="")
    given = parser.parse_args()
    (HERE / "results").mkdir(exist_ok=True)
    for name in given.only:
        command = [sys.executable, "-c", "from orchard.cli import main; main()", "bench", name]
        command.append("--json")
        if name in TAKE_A_MODEL and given.model:
            command += ["--model", given.model, "--data", given.data]
        started, load = time.monotonic(), os.getloadavg()[0]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - started
        found = {"seconds": round(seconds, 1), "load_before": round(load, 2)}
        text = json.dumps({**found, **json.loads(done.stdout)}, indent=1)
        (HERE / "results" / f"{name}.json").write_text(text + "\n")
        print(f"{name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
