"""How long a person waits: for help, for an import, for the first training of the tiny recipe.

Every command is a process of its own, timed from its start on the wall and in CPU seconds, user and
system together, which a busy machine changes less. What the interpreter and the libraries take
alone stands beside it. Files are in the page cache: each command runs once before it is timed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from orchard.catalog import find_recipe

_MAIN = "from orchard.cli import main; main()"
COMMANDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "interpreter": ("-c", "pass"),
        "import": ("-c", "import orchard"),
        "help": ("-c", _MAIN, "--help"),
        "libraries": ("-c", "import torch, transformers"),
    }
)
"""Name to arguments of the interpreter."""
LIMITS: Mapping[str, float] = MappingProxyType({"help": 0.5, "import": 0.3, "first_training": 10.0})
"""Name to the seconds that it may take."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PATIENCE_SECONDS = 120


def run_to_end(arguments: Sequence[str]) -> tuple[float, float]:
    """Return wall and CPU seconds of a command.

    Raises:
        RuntimeError: It failed; with the end of what it wrote.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"a measured command failed: {said.decode()[-500:]}")
    return seconds, usage.ru_utime + usage.ru_stime


def run_to_first_training(recipe: Path) -> tuple[float, float]:
    """Return wall and CPU seconds until a run has logged its first client.

    That client's local training is over by then, so its first step came earlier. The run is stopped
    there.

    Raises:
        RuntimeError: The run ended or took too long before that; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="orchard-bench-") as name:
        folder = Path(name) / "run"
        log = folder / "metrics.jsonl"
        command = [sys.executable, "-c", _MAIN, "run", str(recipe), "--out", str(folder)]
        with (Path(name) / "said").open("w+b") as said:
            started = time.perf_counter()
            process = subprocess.Popen(command, stdout=said, stderr=said)
            try:
                while not (log.exists() and b'"kind": "client"' in log.read_bytes()):
                    waited = time.perf_counter() - started
                    if process.poll() is not None or waited > _PATIENCE_SECONDS:
                        said.seek(0)
                        end = said.read().decode()[-500:]
                        raise RuntimeError(f"a run did not train within {waited:.0f} s: {end}")
                    time.sleep(0.005)
                seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds(process.pid)
            finally:
                process.kill()
                process.wait()
    return seconds, cpu_seconds


def _cpu_seconds(pid: int) -> float:
    """Return what a running process has used; NaN where the system does not say."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return float("nan")
    # After the name, which may hold blanks, user and system ticks are the 12th and 13th.
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def slowest_imports(count: int = 10) -> dict[str, float]:
    """Return the modules whose own code takes most of ``orchard --help``, in seconds."""
    command = [sys.executable, "-X", "importtime", *COMMANDS["help"]]
    lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    own = {}
    for line in lines:
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            own[parts[2].strip()] = int(parts[0]) / 1e6
    return dict(sorted(own.items(), key=lambda item: -item[1])[:count])


def bench_start(
    *, repeats: int = 5, training_repeats: int = 3, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Time every command in turn, and then runs of the tiny recipe up to their first client.

    Args:
        repeats: Of each command, after one that is not counted; medians.
        training_repeats: Of the run.
        say: Hears of every median.

    Returns:
        ``..._seconds`` and ``..._cpu_seconds`` of each of ``COMMANDS`` and of ``first_training``;
        ``..._limit_seconds`` of ``LIMITS``; ``slowest_imports`` of the help.
    """
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for number in range(repeats + 1):
        for name, arguments in COMMANDS.items():
            taken = run_to_end(arguments)
            if number:
                spent[name].append(taken)
    recipe = find_recipe(Path("tiny/flex.toml"))
    spent["first_training"] = [run_to_first_training(recipe) for _ in range(training_repeats)]
    found: dict[str, Any] = {"repeats": repeats, "training_repeats": training_repeats}
    for name, times in spent.items():
        found[f"{name}_seconds"], found[f"{name}_cpu_seconds"] = map(
            median, zip(*times, strict=True)
        )
        if name in LIMITS:
            found[f"{name}_limit_seconds"] = LIMITS[name]
        say(f"{name}: {found[f'{name}_seconds']:.3f} s, CPU {found[f'{name}_cpu_seconds']:.3f} s")
    found["slowest_imports"] = slowest_imports()
    return found
