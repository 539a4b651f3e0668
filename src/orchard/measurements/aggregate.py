"""What a server's round costs: reading updates and adding them up, beside a copy and Flower.

Updates are message files. Reading a file stands for the network and is not counted; all else is:
``Channel.unpack_update``, the strategy's aggregation, the optimizer's step. Three things take turns
in one process, on one thread: a plain copy of as many bytes, this package, and Flower's FedAvg,
whose replies are all in memory before it begins. Peaks are of processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from orchard.communication.channel import Channel
from orchard.communication.messages import Update, decode_update
from orchard.communication.stages import DTYPES, Cast
from orchard.extras import lacking
from orchard.models.stored.loading import threads
from orchard.process_memory import loading_to_stay, peak_memory_bytes, resident_memory_bytes
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import Strategy, update_server

_NUM_FILES = 4  # different updates, which clients take in turn
_COPIES = 10  # of each repeat: enough to last as long as a few updates
_ERROR = 1e-6  # of float32 sums of 20 numbers around 1, in whichever order


@dataclass(frozen=True)
class Case:
    """Updates of one kind.

    Attributes:
        folder: Holds the messages.
        num_clients: Updates of a round.
        num_tensors: Of each update, all of one shape.
        num_bytes: Of an update's tensors, as sent.
        dtype: As sent.
    """

    folder: str
    num_clients: int
    num_tensors: int
    num_bytes: int
    dtype: str

    @property
    def num_elements(self) -> int:
        """Of an update."""
        return self.num_bytes // DTYPES[self.dtype].itemsize // self.num_tensors * self.num_tensors

    @property
    def tree_bytes(self) -> int:
        """Of the global tree, which is in float32."""
        return 4 * self.num_elements

    def channel(self) -> Channel:
        """Return the way on which the updates come."""
        cast = (Cast(DTYPES[self.dtype]),)
        return Channel(cast, cast)

    def names(self) -> list[str]:
        """Return names as they are on the wire."""
        return [
            f"layers.{i // 60}.experts.{i % 60}.down_proj.lora_A" for i in range(self.num_tensors)
        ]

    def path(self, client: int) -> Path:
        """Return the file of a client's update, which weighs its number in the files and 1."""
        return Path(self.folder) / f"{client % _NUM_FILES}.message"


def write_messages(case: Case) -> None:
    """Write the updates of a case to its folder."""
    generator = torch.Generator().manual_seed(0)
    size = case.num_elements // case.num_tensors
    for number in range(_NUM_FILES):
        delta = {name: torch.randn(size, generator=generator) for name in case.names()}
        update = Update(f"client {number}", 1, delta, dict.fromkeys(delta, number + 1.0))
        path = Path(case.folder) / f"{number}.message"
        path.write_bytes(case.channel().pack_update(update))


def _state(case: Case) -> ServerState:
    size = case.num_elements // case.num_tensors
    # fill_ so that the memory is there, which zeros alone is not.
    return ServerState(0, {name: torch.empty(size).fill_(0.0) for name in case.names()})


@dataclass
class _Arrivals:
    """A round's updates, and how long the server did not wait for them.

    Attributes:
        case: What comes.
        waited: Wall and CPU seconds of reading files.
    """

    case: Case
    waited: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def __iter__(self) -> Iterator[Update]:
        channel, message = self.case.channel(), bytearray()
        for client in range(self.case.num_clients):
            before = _clocks()
            path = self.case.path(client)
            # As from a socket, into the buffer of the message before, which is let go by now.
            if len(message) != path.stat().st_size:
                message = bytearray(path.stat().st_size)
            with path.open("rb", buffering=0) as file:
                file.readinto(message)
            times = zip(self.waited, _clocks(), before, strict=True)
            self.waited = [waited + now - then for waited, now, then in times]
            yield channel.unpack_update(message)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _aggregate(case: Case, state: ServerState) -> tuple[ServerState, list[float]]:
    """Return the state after a round, and its wall and CPU seconds."""
    arrivals = _Arrivals(case)
    before = _clocks()
    after = update_server(Strategy(), state, arrivals)
    spent = [now - b - w for now, b, w in zip(_clocks(), before, arrivals.waited, strict=True)]
    return after, spent


def time_sides(
    case: Case, *, repeats: int, with_flower: bool, peer_clients: int = 20
) -> dict[str, Any]:
    """Return seconds per update of a copy, of this package and of Flower.

    Flower's rounds have ``peer_clients``, of which it holds all; both means are compared for those.

    Raises:
        RuntimeError: The two means differ.
    """
    state = _state(case)
    source = torch.empty(case.num_bytes, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source).fill_(0)
    sides: dict[str, Callable[[], list[float]]] = {
        "copy": lambda: _seconds(lambda: target.copy_(source), _COPIES),
        "ours": lambda: [spent / case.num_clients for spent in _aggregate(case, state)[1]],
    }
    found: dict[str, Any] = {}
    if with_flower:
        from orchard.measurements.flower_peer import aggregate_replies, flower_version, to_arrays

        few = replace(case, num_clients=peer_clients)
        replies = _flower_replies(few, own_memory=False)
        sides["flower"] = lambda: [
            spent / peer_clients for spent in _seconds(lambda: aggregate_replies(replies), 1)
        ]
        ours, theirs = _aggregate(few, state)[0].shared, to_arrays(aggregate_replies(replies))
        found["largest_difference"] = max(
            float((ours[name] - torch.from_numpy(theirs[name])).abs().max()) for name in ours
        )
        if ours.keys() != theirs.keys() or found["largest_difference"] > _ERROR:
            raise RuntimeError(f"both must have one mean, got {found['largest_difference']} apart")
        found["flower_version"] = flower_version()
    spent: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            spent[name].append(run())
    for name, runs in spent.items():
        for index, clock in enumerate(("seconds", "cpu_seconds")):
            found[f"{name}_{clock}_per_update"] = median(run[index] for run in runs)
    return found


def _seconds(run: Callable[[], object], times: int) -> list[float]:
    """Return wall and CPU seconds of one of several calls."""
    before = _clocks()
    for _ in range(times):
        run()
    return [(now - b) / times for now, b in zip(_clocks(), before, strict=True)]


def _flower_replies(case: Case, *, own_memory: bool) -> list[Any]:
    """Return all replies of a round, each of its own memory or those of one file shared."""
    from orchard.measurements.flower_peer import make_reply

    def reply(client: int) -> Any:
        number = client % _NUM_FILES
        delta = decode_update(case.path(client).read_bytes()).delta
        arrays = {name: tensor.numpy() for name, tensor in delta.items()}
        return make_reply(arrays, num_examples=number + 1.0)

    if own_memory:
        return [reply(client) for client in range(case.num_clients)]
    different = [reply(number) for number in range(_NUM_FILES)]
    return [different[client % _NUM_FILES] for client in range(case.num_clients)]


def measure_memory(case: Case, *, with_flower: bool) -> dict[str, float]:
    """Return the peak of one round in this process, in trees above what it held before.

    ``peak_trees`` is above a process that holds the global tree, ``peak_trees_with_global`` above
    one that does not.
    """
    if with_flower:
        from orchard.measurements.flower_peer import aggregate_replies
    process = resident_memory_bytes()
    if with_flower:
        kept: Any = aggregate_replies(_flower_replies(case, own_memory=True))
        held, seconds = process, 0.0
    else:
        state = _state(case)
        held = resident_memory_bytes()
        kept, (seconds, _) = _aggregate(case, state)
    peak = peak_memory_bytes()
    del kept
    return {
        "peak_bytes": peak,
        "process_bytes": process,
        "peak_trees": (peak - held) / case.tree_bytes,
        "peak_trees_with_global": (peak - process) / case.tree_bytes,
        "seconds_per_update": seconds / case.num_clients,
    }


def _elsewhere(what: str, case: Case, **options: Any) -> dict[str, Any]:
    """Run ``time_sides`` or ``measure_memory`` in a process of its own.

    Raises:
        RuntimeError: The process failed; with the end of what it wrote.
    """
    arguments = json.dumps([what, asdict(case), options])
    command = [sys.executable, "-m", "orchard.measurements.aggregate", arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a measured process failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def _messages(case: Case) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="orchard-bench-") as folder:
        case = replace(case, folder=folder)
        write_messages(case)
        yield case


def has_flower() -> bool:
    """Say whether the peer is installed."""
    return not lacking("flower")


def bench_aggregate(
    *,
    num_clients: int = 100,
    peer_clients: int = 20,
    num_bytes: int = 100_000_000,
    num_tensors: int = 24,
    small_tensors: int = 2400,
    repeats: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure rounds of large tensors, of many small ones, and of bfloat16.

    Args:
        num_clients: Of a round.
        peer_clients: Of the peer's round, since Flower holds all of its updates.
        num_bytes: Of an update as sent.
        num_tensors: Of an update of large tensors.
        small_tensors: Of an update of small ones.
        repeats: Of each side, in turn; medians.
        say: Hears of every case that was measured.

    Returns:
        For each case ``..._seconds_per_update`` and ``..._cpu_seconds_per_update`` of each side;
        ``bandwidth_share``, bytes read and written per second over those of the copy;
        ``update_bytes_over_copied_bytes``, an update's bytes per second over the copy's, a stricter
        measure as a sum moves three bytes where a copy moves two; ``speedup_over_flower``;
        ``memory`` and ``flower_memory``, see ``measure_memory``. ``flower`` is its version, or says
        that it is missing.
    """
    with_flower = has_flower()
    missing = "not installed: the peer is missing; install the extra named flower"
    found: dict[str, Any] = {
        "num_clients": num_clients,
        "peer_clients": peer_clients,
        "update_bytes": num_bytes,
        "repeats": repeats,
        "flower": missing,
    }
    large = Case("", num_clients, num_tensors, num_bytes, "float32")
    cases = {
        "float32": large,
        "float32_small_tensors": replace(large, num_tensors=small_tensors),
        "bfloat16": replace(large, dtype="bfloat16"),
    }
    for name, template in cases.items():
        with _messages(template) as case:
            few = replace(case, num_clients=peer_clients)
            # numpy has no bfloat16, so Flower's FedAvg cannot read it.
            is_compared = with_flower and case.dtype == "float32"
            options = {"with_flower": is_compared, "peer_clients": peer_clients}
            timed = _elsewhere("time", case, repeats=repeats, **options)
            found["flower"] = timed.pop("flower_version", found["flower"])
            one = {**timed, **compare(case, timed)}
            one["memory"] = _elsewhere("memory", case, with_flower=False)
            if is_compared:
                one["flower_memory"] = _elsewhere("memory", few, with_flower=True)
        found[name] = one
        say(
            f"{name}: {one['bandwidth_share']:.2f} of a copy's bandwidth, "
            f"{one['memory']['peak_trees']:.2f} trees"
        )
    return found


def compare(case: Case, timed: Mapping[str, float]) -> dict[str, float]:
    """Return the ratios of one case, of CPU seconds: all sides have one thread and never wait."""
    copy, ours = (timed[f"{side}_cpu_seconds_per_update"] for side in ("copy", "ours"))
    # The message is read, and the sum is read and written; a copy reads and writes.
    moved = case.num_bytes + 2 * case.tree_bytes
    ratios = {
        "bandwidth_share": (moved / ours) / (2 * case.num_bytes / copy),
        "update_bytes_over_copied_bytes": copy / ours,
        "copy_bytes_per_second": 2 * case.num_bytes / copy,
    }
    if "flower_cpu_seconds_per_update" in timed:
        ratios["speedup_over_flower"] = timed["flower_cpu_seconds_per_update"] / ours
    return ratios


def main(arguments: Sequence[str]) -> None:
    """Measure what is given as JSON in this process, and print what was found as JSON."""
    what, about, options = json.loads(arguments[0])
    run: Callable[..., dict[str, Any]] = time_sides if what == "time" else measure_memory
    with loading_to_stay():  # as orchard run does
        pass
    with threads(1):
        print(json.dumps(run(Case(**about), **options)))


if __name__ == "__main__":
    main(sys.argv[1:])
