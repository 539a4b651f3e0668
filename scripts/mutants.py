"""Count how many small changes of the source the tests notice.

python scripts/mutants.py draws mutants of src/orchard, runs the tests that execute each changed
place, the cheapest first, and writes which mutants were killed, and by which test. A first run of
all tests finds out what each executes; it is kept beside the result and used again while neither
source nor tests change.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import shutil
import signal
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

from mutation.following import Covered, cover
from mutation.processes import Setup, failures, start_tests, warm
from mutation.sites import ROOMS, SOURCE, Mutant, draw_sample, locate

ROOT = Path(__file__).parent.parent
QUICK_SECONDS = 0.5
"""Tests below this run first; of the others, all of a file together, since they share fixtures."""
ALIVE = ("survived", "undecided", "not covered")


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        mutant: Which.
        verdict: ``killed``, ``timed out`` (as good as killed), ``survived``, ``undecided`` (the
            cheapest tests let it live, and the others did not run), ``not covered`` (no test
            executes it in its own process), or ``not found`` in another version's source.
        killer: The first test that failed, or that none could begin.
        num_tests: How many tests were chosen.
        seconds: Wall time.
    """

    mutant: Mutant
    verdict: str
    killer: str | None = None
    num_tests: int = 0
    seconds: float = 0.0


def find_importers(repository: Path) -> dict[str, set[str]]:
    """Return file to the files that import from it."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (repository / SOURCE).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = Path("src", *node.module.split("."))
                for target in (module, *(module / alias.name for alias in node.names)):
                    found[f"{target}.py"].add(str(path.relative_to(repository)))
    return found


def choose_tests(mutant: Mutant, covered: Covered, importers: Mapping[str, set[str]]) -> list[str]:
    """Return the tests that can notice a mutant: of its own module first, then the cheapest.

    What runs at import is looked at through everything that its file, and the files that import
    from it, do when a test calls them.
    """
    if mutant.at_import:
        files = {mutant.file, *importers.get(mutant.file, ())}
        tests = {t for f in files for own in covered.lines.get(f, {}).values() for t in own}
    else:
        lines = covered.lines.get(mutant.file, {})
        places = range(mutant.first_line, mutant.last_line + 1)
        tests = {test for line in places for test in lines.get(line, ())}
    in_file: dict[str, float] = defaultdict(float)
    for test in tests:
        in_file[test.partition("::")[0]] += covered.seconds[test]

    def key(test: str) -> tuple[bool, bool, float, str, float]:
        file, seconds = test.partition("::")[0], covered.seconds[test]
        is_own = Path(file).stem == f"test_{Path(mutant.file).stem}"
        return not is_own, seconds >= QUICK_SECONDS, in_file[file], file, seconds

    return sorted(tests, key=key)


@dataclass(frozen=True)
class _Running:
    mutant: Mutant
    num_tests: int
    has_every: bool
    limit: float
    started: float = field(default_factory=time.monotonic)


def try_mutants(
    setup: Setup, mutants: Sequence[Mutant], *, covered: Covered, jobs: int, most_seconds: float
) -> Iterator[Outcome]:
    """Yield what becomes of each mutant, as it is known.

    Of its tests, those run that take ``most_seconds`` together without it.
    """
    importers = find_importers(setup.repository)
    waiting = list(mutants)[::-1]
    running: dict[int, _Running] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            every = choose_tests(mutant, covered, importers)
            if not every:
                yield Outcome(mutant, "not covered")
                continue
            sums = list(accumulate(covered.seconds[test] for test in every))
            tests = every[: max(1, bisect_right(sums, most_seconds))]
            pid = start_tests(setup, f"mutant{mutant.number}", tests, mutant)
            limit = 20 + 4 * sums[len(tests) - 1]
            running[pid] = _Running(mutant, len(tests), len(tests) == len(every), limit)
        time.sleep(0.05)
        for pid, run in list(running.items()):
            mutant = run.mutant
            ended, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - run.started
            if ended and status:
                verdict = "killed"
            elif ended:
                verdict = "survived" if run.has_every else "undecided"
            elif seconds > run.limit:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                verdict = "timed out"
            else:
                continue
            del running[pid]
            name = f"mutant{mutant.number}"
            shutil.rmtree(setup.folder / f"{name}.tmp", ignore_errors=True)
            killer = next(iter(failures(setup, name)), None)
            if verdict == "killed" and killer is None:
                killer = f"no test: exit status {os.waitstatus_to_exitcode(status)}"
            yield Outcome(mutant, verdict, killer, run.num_tests, round(seconds, 1))


def failing_anyway(setup: Setup, outcomes: Sequence[Outcome]) -> list[str]:
    """Return killers that fail, among the killers alone, without a mutant too."""
    killers = sorted({o.killer for o in outcomes if o.killer and "::" in o.killer})
    if not killers:
        return []
    os.waitpid(start_tests(setup, "killers", killers), 0)
    return failures(setup, "killers")


def summarize(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Return the counts and the killed share of each room and of all; timed out is killed."""
    table: dict[str, dict[str, float]] = {}
    for room in (*ROOMS, "elsewhere", "all"):
        own = [o for o in outcomes if room in (o.mutant.room, "all") and o.verdict != "not found"]
        counts = Counter(o.verdict for o in own)
        if own:
            killed = counts["killed"] + counts["timed out"]
            table[room] = {
                **counts,
                "mutants": len(own),
                "killed_share": round(killed / len(own), 3),
            }
    return table


def _describe(outcome: Outcome) -> str:
    own = outcome.mutant
    change = own.text if own.what in ("call", "raise") else f"{own.old} -> {own.new}: {own.text}"
    return f"{own.number} {own.file}:{own.line} {own.what}, {outcome.verdict}: {change}"


def _write(out: Path, outcomes: Sequence[Outcome], *, suspects: Sequence[str]) -> None:
    ordered = sorted(outcomes, key=lambda outcome: outcome.mutant.number)
    record = {
        "summary": summarize(ordered),
        "survivors": [_describe(outcome) for outcome in ordered if outcome.verdict in ALIVE],
        "not_found": [o.mutant.number for o in ordered if o.verdict == "not found"],
        "killers_that_fail_anyway": list(suspects),
        "mutants": [asdict(outcome) for outcome in ordered],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


def _sample(options: argparse.Namespace, out: Path, repository: Path) -> list[Mutant]:
    """Read a sample, or draw it and write it beside the result."""
    path: Path = options.sample or out.with_suffix(".sample.json")
    if options.sample is None or not path.exists():
        drawn = draw_sample(repository, size=options.size, seed=options.seed)
        path.write_text(json.dumps([asdict(mutant) for mutant in drawn], indent=1) + "\n")
    sample = [Mutant(**entry) for entry in json.loads(path.read_text())]
    numbers = {int(number) for number in (options.only or "").split(",") if number}
    return [mutant for mutant in sample if not numbers or mutant.number in numbers]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--size", type=int, default=150, help="mutants to draw")
    add("--seed", type=int, default=0, help="of the draw")
    add("--sample", type=Path, help="list of mutants: read where it exists, else written")
    add("--repository", type=Path, default=ROOT, help="checkout whose source is changed")
    add("--tests", type=Path, help="checkout whose tests run; default: the repository's own")
    add("--only", help="numbers of mutants, with commas")
    add("--markers", help="for pytest -m; default: as pyproject says")
    add("--first", type=float, default=math.inf, help="seconds of tests to run for each mutant")
    add("--jobs", type=int, default=2, help="processes at a time")
    add("--out", type=Path, default=ROOT / "runs" / "mutants.json", help="the result")
    return parser.parse_args()


def main() -> None:
    """Try the mutants and print what became of them."""
    options = _options()
    os.environ["OMP_NUM_THREADS"] = "1"
    out, repository = options.out.resolve(), options.repository.resolve()
    folder = out.with_suffix(".logs")
    folder.mkdir(parents=True, exist_ok=True)
    setup = Setup(repository, (options.tests or repository).resolve(), options.markers, folder)
    sample = _sample(options, out, repository)
    warm()
    covered = cover(setup, out.with_suffix(".coverage.json"))
    print(f"{len(covered.seconds)} tests pass, {len(covered.failed)} fail", flush=True)
    here = {mutant: locate(mutant, repository) for mutant in sample}
    outcomes = [Outcome(m, "not found") for m, found in here.items() if found is None]
    mutants = [found for found in here.values() if found is not None]
    for outcome in try_mutants(
        setup, mutants, covered=covered, jobs=options.jobs, most_seconds=options.first
    ):
        outcomes.append(outcome)
        by = f" by {outcome.killer}" if outcome.killer else ""
        print(f"{_describe(outcome)} ({outcome.seconds} s{by})", flush=True)
        _write(out, outcomes, suspects=())
    _write(out, outcomes, suspects=failing_anyway(setup, outcomes))
    record = json.loads(out.read_text())
    print("\nalive", *record["survivors"], sep="\n")
    print(
        "\nshares", *(f"{room}: {counts}" for room, counts in record["summary"].items()), sep="\n"
    )


if __name__ == "__main__":
    main()
