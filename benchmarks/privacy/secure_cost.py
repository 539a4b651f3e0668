"""What secure sums cost over plain ones: bytes and seconds, in the simulator and between sites.

python -m benchmarks.privacy.secure_cost --work runs/secure_cost
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.blocks import paragraph, table
from benchmarks.records import Record, keep, origins
from orchard.communication.messages import Update, decode_update, encode_update
from orchard.data import world
from orchard.deployment.localhost import Processes, running
from orchard.engine.secret_sum import SecretRound
from orchard.results import environment
from orchard.secure.fixed_point import FixedPoint
from orchard.secure.graph import Graph
from orchard.secure.rules import Rules, default_threshold
from orchard.server.aggregation import mean

HERE = Path(__file__).parent
RESULT = HERE / "results" / "secure_aggregation.json"
SECURE = "privacy.secure_aggregation=true"
QUICK = (
    *("client.steps=1", "client.batch_size=4", "server.rounds=3", "evaluation.models="),
    *("evaluation.retention_path=", "communication.dtype=float32", "model.num_threads=1"),
)
NEIGHBORS = {3: (0,), 10: (0, 4), 50: (0, 24)}
REPEATS = {3: 5, 10: 5, 50: 3}
VALUES = 250_000
DRAWS = 2_000


def main() -> None:
    """Measure, or say what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/secure_cost"))
    parser.add_argument("--only", nargs="*", default=["simulator", "sites", "draws"])
    options = parser.parse_args()
    kept: Record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    work = options.work.resolve()
    if "simulator" in options.only:
        kept["simulator"] = [row for number in NEIGHBORS for row in _simulated(number)]
        kept |= environment()
    if "sites" in options.only:
        kept["sites"] = _between_sites(work)
    if "draws" in options.only:
        kept["draws"] = [_recovered(50, number, 15) for number in (8, 16, 24, 32)]
    keep(RESULT, kept)


def _simulated(number: int) -> Iterator[Record]:
    """Yield what a sum of so many clients costs, without secrecy and with it.

    Clients have made-up updates: what is measured is the way from an update to the mean alone.
    """
    generator = torch.Generator().manual_seed(0)
    names = [f"client{index:02}" for index in range(number)]
    updates = []
    for name in names:
        delta = {f"t{i}": torch.randn(VALUES // 10, generator=generator) * 1e-3 for i in range(10)}
        updates.append(Update(name, 1, delta, dict.fromkeys(delta, 1.0)))
    yield _row(number, None, [_plain(updates) for _ in range(REPEATS[number])])
    for neighbors in NEIGHBORS[number]:
        yield _row(number, neighbors, [_secret(updates, neighbors) for _ in range(REPEATS[number])])


def _row(number: int, neighbors: int | None, found: Sequence[Sequence[float]]) -> Record:
    up, down, seconds = (median(column) for column in zip(*found, strict=True))
    return {
        "clients": number,
        "neighbors": neighbors,
        "values": VALUES,
        "repeats": len(found),
        "uplink_bytes_per_client": up / number,
        "downlink_bytes_per_client": down / number,
        "cpu_seconds": seconds,
        "cpu_seconds_per_client": seconds / number,
    }


def _plain(updates: Sequence[Update]) -> tuple[float, float, float]:
    """Return bytes up and down beside the task, and seconds of CPU of both sides."""
    started = time.process_time()
    messages = [encode_update(update) for update in updates]
    mean(map(decode_update, messages))
    return sum(map(len, messages)), 0.0, time.process_time() - started


def _secret(updates: Sequence[Update], neighbors: int) -> tuple[float, float, float]:
    started = time.process_time()
    shapes = {name: tuple(tensor.shape) for name, tensor in updates[0].delta.items()}
    cohort = [update.client_id for update in updates]
    written = FixedPoint(shapes, 16.0, 1.0, len(cohort))
    one = SecretRound(written, cohort, least=3, num_neighbors=neighbors)
    for update in updates:
        one.send(update)
    one.end(1)
    return one.uplink_bytes, one.downlink_bytes, time.process_time() - started


def _cost(run: Path, *, num_clients: int) -> Record:
    """Return medians over a run's rounds but the first, which has the start in it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"][1:]
    names = ("uplink_bytes", "downlink_bytes", "seconds")
    found = {name: median(line[f"round/{name}"] for line in rounds) for name in names}
    found["num_rounds"] = len(rounds)
    found |= {f"{name}_per_client": found[name] / num_clients for name in names[:2]}
    return found


def _between_sites(work: Path) -> list[Record]:
    """Return what a round costs between three sites, as real processes with TLS and keys."""
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    for office in world.offices(0)[:3]:
        rows = [{"instruction": e.instruction, "response": e.response} for e in office.train[:24]]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{office.name}.jsonl").write_text(text)
    found = []
    peers = ("--peers", str(work / "federation" / "keys" / "sites"), "--min-test", "1")
    own = ("data.partition=file", "data.category=", "data.test_size=0.25", "server.rounds=4")
    with running(Processes(work / "federation", data, peers)) as federation:
        for name, way in (("plain", ()), ("secure", (SECURE,))):
            run = work / "sites" / name
            recipe = Path("recipes/tiny/fedavg.toml")
            coordinator = federation.start_coordinator(recipe, [*QUICK, *own, *way], run=run)
            if coordinator.wait(500):
                raise RuntimeError(federation.tail())
            found.append({"clients": 3, "way": name, **_cost(run, num_clients=3)})
    return found


def _recovered(number: int, num_neighbors: int, num_gone: int) -> Record:
    """Return in how many draws of who leaves the secrets of all members come back."""
    import numpy as np

    names = [f"m{index:02}" for index in range(number)]
    rules = Rules(3, default_threshold(number), num_neighbors)
    draws = np.random.default_rng(0)
    num_recovered = 0
    for _ in range(DRAWS):
        graph = Graph(frozenset(names), num_neighbors, draws.bytes(32))
        gone = {names[i] for i in draws.choice(number, num_gone, replace=False)}
        fewest = graph.threshold(rules)
        num_recovered += all(len(graph.holders(name) - gone) >= fewest for name in names)
    return {
        "members": number,
        "neighbors": num_neighbors,
        "gone": num_gone,
        "threshold": num_neighbors // 2 + 1,
        "draws": DRAWS,
        "recovered": num_recovered,
    }


def block() -> str:
    """Return what a page says of the costs, from the results."""
    kept: Record = json.loads(RESULT.read_text())
    rows = []
    for own in kept["simulator"]:
        way = {None: "plain", 0: "secure"}.get(own["neighbors"], f"{own['neighbors']} neighbors")
        seconds = f"{1000 * own['cpu_seconds_per_client']:.1f}"
        rows.append([str(own["clients"]), way, *_sizes(own), seconds])
    costs = table(
        ("clients", "sum", "KB up per client", "KB down per client", "ms of CPU per client"), rows
    )
    sites = table(
        ("3 sites, processes", "KB up per site", "KB down per site", "s per round"),
        [[own["way"], *_sizes(own), f"{own['seconds']:.1f}"] for own in kept.get("sites", ())],
    )
    drawn = table(
        ("neighbors of 50", "threshold of a neighborhood", "draws of 15 who leave that recover"),
        [
            [str(own["neighbors"]), str(own["threshold"]), f"{own['recovered']} of {own['draws']}"]
            for own in kept["draws"]
        ],
        num_words=0,
    )
    return f"{costs}\n\n{sites}\n\n{drawn}\n\n{paragraph(origins([kept]))}"


def _sizes(own: Record) -> list[str]:
    return [f"{own[f'{way}_bytes_per_client'] / 1000:.1f}" for way in ("uplink", "downlink")]


if __name__ == "__main__":
    main()
