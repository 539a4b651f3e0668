"""Two sites behind bad lines: 100 ms each way, 1 % of packets lost, and one unplugged for a minute.

    python tests/faults/network.py --out FOLDER

Needs Linux, root and /dev/net/tun. The coordinator and each site run in network namespaces of
their own; a line between two of them is a pair of TUN devices, and this process carries every
packet from one to the other, late or not at all. (``tc netem`` does so in the kernel where the
kernel has it.) The recipe, FLEx on the tiny model, is also run undisturbed in the simulator.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from orchard.communication.audit import read_audit
from orchard.deployment.localhost import ORCHARD
from orchard.recipe.reading import to_toml
from orchard.results import MetricsLog, environment
from sites import same, shared_tensors, site_recipe, write_sites

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PORT = 8443


def can_run() -> bool:
    """Say whether this machine lets us make namespaces and TUN devices."""
    return (
        sys.platform == "linux"
        and os.geteuid() == 0
        and Path("/dev/net/tun").exists()
        and shutil.which("ip") is not None
    )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """Have a network namespace inside."""
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        _ip("netns", "del", name)


def _tun(name: str, space: str, address: str) -> int:
    """Make a TUN device in a namespace, and return the file that its packets come out of."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    flags = struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(device, _TUNSETIFF, flags)
    _ip("link", "set", name, "netns", space)
    _ip("-n", space, "address", "add", address, "dev", name)
    _ip("-n", space, "link", "set", name, "up")
    return device


@dataclass
class Line:
    """Carries packets between two devices, late, with losses, or not at all.

    Attributes:
        ends: The files of the two devices.
        delay_seconds: Each way.
        loss: Share of the packets that is lost.
        is_plugged: Whether anything is carried.
        num_carried: Packets.
        num_lost: Packets, those while it was unplugged among them.
    """

    ends: tuple[int, int]
    delay_seconds: float
    loss: float
    is_plugged: bool = True
    num_carried: int = 0
    num_lost: int = 0
    _end: threading.Event = field(default_factory=threading.Event)

    def carry(self) -> None:
        """Carry until stopped."""
        draw = random.Random(0)
        waiting: list[tuple[float, int, int, bytes]] = []
        count = 0
        while not self._end.is_set():
            wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
            ready, _, _ = select.select(self.ends, [], [], min(wait, 0.2))
            for source in ready:
                packet = os.read(source, 65536)
                if not self.is_plugged or draw.random() < self.loss:
                    self.num_lost += 1
                    continue
                target = self.ends[1 - self.ends.index(source)]
                count += 1
                heapq.heappush(
                    waiting, (time.monotonic() + self.delay_seconds, count, target, packet)
                )
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(waiting)
                self.num_carried += 1
                os.write(target, packet)

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """Carry in a thread inside."""
        thread = threading.Thread(target=self.carry, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()
            for end in self.ends:
                os.close(end)


def _start(space: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", space, ORCHARD, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _round(run: Path) -> int:
    lines = MetricsLog(run / "metrics.jsonl").read()
    return max((line["round"] for line in lines if line["kind"] == "round"), default=0)


def strangers_status(space: str, host: str) -> int:
    """Return what the coordinator answers a stranger who wants to start an app."""
    code = (
        "import ssl, urllib.request, urllib.error\n"
        f"request = urllib.request.Request('https://{host}:{PORT}/v1/control/list-runs', b'')\n"
        "context = ssl._create_unverified_context()\n"
        "try:\n    print(urllib.request.urlopen(request, context=context).status)\n"
        "except urllib.error.HTTPError as error:\n    print(error.code)\n"
    )
    command = ["ip", "netns", "exec", space, sys.executable, "-c", code]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run(folder: Path, *, rounds: int, unplug_seconds: float) -> dict[str, object]:
    """Run the federation over bad lines, and return what happened."""
    data = write_sites(folder / "data")
    names = sorted(path.stem for path in data.glob("*.jsonl"))
    recipe = folder / "recipe.toml"
    options = (f"server.rounds={rounds}", "deployment.probe_seconds=10")
    recipe.write_text(to_toml(site_recipe("flex", data, "model.path=orchard:tiny", *options)))
    simulated = folder / "simulated"
    command = [ORCHARD, "run", str(recipe), "--out", str(simulated)]
    subprocess.run(command, check=True, capture_output=True)
    keys = [part for number in (1, 2) for part in ("--host", f"10.77.{number}.1")]
    keys += [part for name in names for part in ("--site", name)]
    subprocess.run([ORCHARD, "keys", str(folder / "keys"), *keys], check=True, capture_output=True)
    with ExitStack() as stack:
        spaces = [stack.enter_context(namespace(f"orchard{n}")) for n in range(3)]
        lines, processes = [], []
        for number in (1, 2):
            line = Line(
                (
                    _tun(f"orchtun{number}a", spaces[0], f"10.77.{number}.1/30"),
                    _tun(f"orchtun{number}b", spaces[number], f"10.77.{number}.2/30"),
                ),
                delay_seconds=0.1,
                loss=0.01,
            )
            lines.append(line)
            stack.enter_context(line.carrying())
        started = time.monotonic()
        for number, name in enumerate(names, start=1):
            site = ["site", "--data", str(data / f"{name}.jsonl"), "--store", str(folder / name)]
            site += ["--min-test", "1"]
            site += ["--superlink", f"10.77.{number}.1:{PORT}", "--keys", str(folder / "keys")]
            processes.append(_start(spaces[number], site, folder / f"{name}.log"))
        coordinator = _start(
            spaces[0],
            [
                *("coordinate", str(recipe), "--address", f"0.0.0.0:{PORT}"),
                *("--keys", str(folder / "keys"), "--out", str(folder / "run")),
            ],
            folder / "coordinator.log",
        )
        try:
            while _round(folder / "run") < 2 and coordinator.poll() is None:
                time.sleep(0.2)
            status = strangers_status(spaces[1], "10.77.1.1")
            unplugged_at = _round(folder / "run")
            lines[1].is_plugged = False
            time.sleep(unplug_seconds)
            lines[1].is_plugged = True
            code = coordinator.wait(900)
        finally:
            for process in (*processes, coordinator):
                process.terminate()
            for process in (*processes, coordinator):
                process.wait(30)
        seconds = time.monotonic() - started
    events = read_audit(folder / "run" / "audit.jsonl")
    result = json.loads((simulated / "result.json").read_text())
    return {
        **environment(),
        "recipe_digest": result["recipe_digest"],
        "data_digest": result["data_digest"],
        "exit_code": code,
        "rounds": rounds,
        "seconds": seconds,
        "unplugged_after_round": unplugged_at,
        "unplugged_seconds": unplug_seconds,
        "packets_carried": [line.num_carried for line in lines],
        "packets_lost": [line.num_lost for line in lines],
        "control_interface_answers_a_site": status,
        "tasks_asked": sum(event["event"] == "asked" for event in events),
        "refused": [event["reason"] for event in events if event["event"] == "refused"],
        "is_equal": same(shared_tensors(folder / "run"), shared_tensors(simulated)),
    }


def main() -> None:
    """Run it and write its record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--unplug-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if not can_run():
        sys.exit("this takes Linux, root, /dev/net/tun and ip")
    with tempfile.TemporaryDirectory(prefix="orchard-network-") as folder:
        found = run(Path(folder), rounds=given.rounds, unplug_seconds=given.unplug_seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "network.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
