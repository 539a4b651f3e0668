"""What leaving one machine costs: seconds per round outside training, base loads, a large update.

    python -m benchmarks.deployment.run [--sites 1 4 16] [--rounds 3]
    python -m benchmarks.deployment.run --large
    python -m benchmarks.deployment.run --table

Real processes with TLS and keys on this machine: a SuperLink, and a SuperNode and a worker for each
site. FedAvg on the packaged tiny model, one optimizer step a round, so that a round is what lies
around its training; --large instead trains all of a random model of 100 MB, at one site. Records go
to results/, and the page is written from them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.deployment.report import HERE, page
from benchmarks.records import keep, origin
from orchard.communication.audit import AUDIT_FILE, read_audit
from orchard.data import world
from orchard.deployment.localhost import Processes, running
from orchard.models.stored.loading import load_tokenizer
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint
from orchard.results import MetricsLog

RECIPE = """
[model]
path = "orchard:tiny"
dtype = "float32"
num_threads = 1
lora_rank = 8
lora_dropout = 0.0

[data]
partition = "file"
template = "plain"
test_size = 2.0
max_tokens = 64

[strategy]
name = "fedavg"

[client]
steps = 1
batch_size = 4

[communication]
dtype = "float32"

[evaluation]
models = ""
"""
# Of Qwen2-MoE's family: about 25 million parameters, 100 MB in float32.
LARGE = Shape(
    layers=4,
    experts=16,
    top_k=2,
    width=256,
    expert_width=448,
    shared_width=512,
    vocabulary=4096,
)


def write_data(folder: Path, num_sites: int) -> Path:
    """Write a file for each site: parts of the four offices' examples."""
    folder.mkdir(parents=True)
    offices = world.offices(0)
    for number in range(num_sites):
        office = offices[number % len(offices)]
        first = 16 * (number // len(offices))
        lines = [
            json.dumps({"instruction": e.instruction, "response": e.response, "category": ""})
            for e in office.train[first : first + 16]
        ]
        (folder / f"site{number:02d}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def files_digest(folder: Path) -> str:
    """Return the SHA-256 of the files of a folder, by name."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.jsonl")):
        found.update(path.name.encode() + b"\n" + path.read_bytes())
    return found.hexdigest()


@contextmanager
def watched(patterns: dict[str, str]) -> Iterator[dict[str, int]]:
    """Note the peak memory of processes while the context lasts.

    Args:
        patterns: What is noted to what the command line of such a process has in it; the largest
            counts.
    """
    peaks = dict.fromkeys(patterns, 0)
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.2):
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    status = (folder / "status").read_text()
                except OSError:
                    continue
                for name, pattern in patterns.items():
                    if pattern in command and "VmHWM:" in status:
                        size = 1024 * int(status.partition("VmHWM:")[2].split()[0])
                        peaks[name] = max(peaks[name], size)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        end.set()
        thread.join()


def run(num_sites: int, *, rounds: int, is_large: bool = False) -> dict[str, Any]:
    """Run a federation of processes, and return what it took."""
    with tempfile.TemporaryDirectory(prefix="orchard-deployment-") as name:
        folder = Path(name)
        data = write_data(folder / "data", num_sites)
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE)
        options = [f"server.rounds={rounds}"]
        site_options = ["--min-test", "1"]  # few rows, so that rounds are short
        if is_large:
            model = folder / "model"
            write_random_checkpoint(model, LARGE, dtype="float32", seed=0)
            load_tokenizer("orchard:tiny").save_pretrained(model)
            site_options += ["--model", str(model)]
            options += [f"model.path={model}", "model.lora_targets=", "model.full_targets=all"]
        federation = Processes(folder / "federation", data, site_options)
        run_folder = folder / "run"
        port = str(federation.port)
        patterns = {
            "superlink": f"orchard.engine.superlink --public 127.0.0.1:{port}",
            "rounds": "flwr-serverapp --runtime-api-address 127.0.0.1:",
            "coordinate": f"--address 127.0.0.1:{port}",
        }
        with running(federation), watched(patterns) as peaks:
            started = time.monotonic()
            coordinator = federation.start_coordinator(recipe, options, run=run_folder)
            code = coordinator.wait(1200)
            assert code == 0, federation.tail()
            seconds = time.monotonic() - started
            lines = list(MetricsLog(run_folder / "metrics.jsonl").read())
            result = json.loads((run_folder / "result.json").read_text())
            loads = [
                sum(e["event"] == "loaded" for e in read_audit(federation.store(site) / AUDIT_FILE))
                for site in federation.names
            ]
        own = [line for line in lines if line["kind"] == "round"]
        # The first round has the loading of the base in it.
        later = [line["round/overhead_seconds"] for line in own[1:]]
        tree = sum(
            path.stat().st_size
            for path in sorted((run_folder / "checkpoints").glob("*/shared.safetensors"))[-1:]
        )
        return {
            **origin(result),
            # Of the files that the sites were given here; the coordinator does not know it.
            "data_digest": files_digest(data),
            "sites": num_sites,
            "rounds": rounds,
            "seconds_in_all": seconds,
            "seconds_of_first_round": own[0]["round/seconds"],
            "overhead_seconds_by_round": [line["round/overhead_seconds"] for line in own],
            "overhead_seconds_per_round": median(later),
            "train_seconds_per_round": median(line["round/train_seconds"] for line in own[1:]),
            "base_loads_by_site": loads,
            "tree_bytes": tree,
            "uplink_bytes_per_client": own[-1]["round/uplink_bytes"] / num_sites,
            "downlink_bytes_per_client": own[-1]["round/downlink_bytes"] / num_sites,
            "peak_bytes": peaks,
        }


def main() -> None:
    """Measure, keep the records, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--table", action="store_true", help="only write the page")
    given = parser.parse_args()
    cases = [(1, True)] if given.large else [(number, False) for number in given.sites]
    for num_sites, is_large in () if given.table else cases:
        found = run(num_sites, rounds=given.rounds, is_large=is_large)
        name = "large" if is_large else f"sites-{num_sites}"
        keep(HERE / "results" / f"{name}.json", found)
        print(json.dumps(found, indent=1), flush=True)
    page().write()


if __name__ == "__main__":
    main()
