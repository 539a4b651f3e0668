"""What several workers cost and give: memory with mapped experts, throughput, on this machine.

    python -m benchmarks.workers.run [--shape large middle] [--repeats 3]

One process against two workers of one thread each, and one process with two threads, on a random
base with random examples; every run is a process tree of its own, whose memory is sampled from
outside (PSS: a page that several processes have counts in part). Records go to results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.records import keep
from orchard.measurements.step_sides import MIDDLE_SHAPE, QWEN_SHAPE
from orchard.models.stored.loading import load_tokenizer
from orchard.models.stored.random_checkpoint import write_random_checkpoint
from orchard.results import environment

HERE = Path(__file__).parent
SHAPES = {
    "middle": (MIDDLE_SHAPE, "float32"),
    "large": (QWEN_SHAPE, "bfloat16"),
    # What experts make of it: half of the layers, and a vocabulary that hardly counts.
    "experts": (replace(QWEN_SHAPE, layers=2, vocabulary=4096), "bfloat16"),
}
WAYS = {
    "one process, one thread": ("1", "1"),
    "one process, two threads": ("1", "2"),
    "two workers, one thread each": ("2", "1"),
}
_WORDS = 40


def write_examples(folder: Path, *, clients: int, rows: int) -> None:
    """Write a file of random words for each client."""
    folder.mkdir()
    for number in range(clients):
        lines = []
        for row in range(rows):
            words = " ".join(f"word{(7 * row + number + i) % 97}" for i in range(_WORDS))
            lines.append(json.dumps({"instruction": words, "response": words, "category": ""}))
        (folder / f"client{number}.jsonl").write_text("\n".join(lines) + "\n")


def tree_memory(pid: int) -> int:
    """Return the PSS of a process and of all that it started, in bytes."""
    total = 0
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += tree_memory(int(child))
    return total


def run(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command to its end; its memory is the median of samples while clients train."""
    samples: list[tuple[float, int]] = []
    end = threading.Event()
    with (folder.parent / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)

        def look() -> None:
            while not end.wait(0.3):
                samples.append((time.time(), tree_memory(process.pid)))

        thread = threading.Thread(target=look)
        thread.start()
        code = process.wait()
        end.set()
        thread.join()
    assert code == 0, (folder.parent / "log").read_text()
    rounds = [
        line
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "round"
    ]
    since = (folder / "checkpoints").stat().st_ctime - rounds[-1]["round/seconds"]
    training = [size for moment, size in samples if moment >= since]
    return {
        "round_seconds": median(line["round/seconds"] for line in rounds[1:]),
        "memory_bytes": median(training or [0]),
        "peak_bytes": max(size for _, size in samples),
        "digest": json.loads((folder / "result.json").read_text())["shared_digest"],
    }


def measure(
    name: str, ways: list[str], *, repeats: int, clients: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Measure ways on one shape, in turn."""
    shape, dtype = SHAPES[name]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="orchard-workers-") as root:
        model = Path(root) / "model"
        write_random_checkpoint(model, shape, dtype=dtype, seed=0)
        load_tokenizer("orchard:tiny").save_pretrained(model)
        write_examples(Path(root) / "data", clients=clients, rows=16)
        for number in range(repeats):
            for way in ways:
                workers, threads = WAYS[way]
                folder = Path(root) / "runs" / f"{number}-{workers}-{threads}" / "run"
                folder.parent.mkdir(parents=True)
                command = [
                    *(sys.executable, "-c", "from orchard.cli import main; main()"),
                    *("run", "tiny/fedavg", "--out", str(folder), "--workers", workers),
                    *(f"model.path={model}", f"model.dtype={dtype}", "model.placement=mapped"),
                    *(f"model.num_threads={threads}", f"data.path={Path(root) / 'data'}"),
                    *("data.test_size=1.0", "data.max_tokens=128", "evaluation.models="),
                    *("evaluation.retention_path=", f"client.steps={steps}"),
                    *("client.batch_size=4", f"server.rounds={rounds}"),
                ]
                found[way].append(run(command, folder))
                print(name, way, found[way][-1], flush=True)
    medians = {
        way: {
            key: median(one[key] for one in own)
            for key in ("round_seconds", "memory_bytes", "peak_bytes")
        }
        for way, own in found.items()
    }
    alone, two = medians["one process, one thread"], medians["two workers, one thread each"]
    threaded = medians.get("one process, two threads")
    return {
        **environment(),
        "load_before": os.getloadavg()[0],
        "clients": clients,
        "steps": steps,
        "medians": medians,
        "speedup_over_one_thread": alone["round_seconds"] / two["round_seconds"],
        "speedup_over_two_threads": threaded and threaded["round_seconds"] / two["round_seconds"],
        "memory_ratio": two["memory_bytes"] / alone["memory_bytes"],
        "peak_ratio": two["peak_bytes"] / alone["peak_bytes"],
        # Two threads round differently.
        "same_bits": len(
            {
                own["digest"]
                for way, all_ in found.items()
                if "two threads" not in way
                for own in all_
            }
        )
        == 1,
    }


def main() -> None:
    """Measure, and keep the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    # Two threads on a busy machine wait for each other by spinning, and may take minutes.
    parser.add_argument("--without-threads", action="store_true")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for name in given.shape:
        ways = [way for way in WAYS if not (given.without_threads and "two threads" in way)]
        found = measure(
            name,
            ways,
            repeats=given.repeats,
            clients=given.clients,
            steps=given.steps,
            rounds=given.rounds,
        )
        keep(HERE / "results" / f"{name}.json", found)
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
