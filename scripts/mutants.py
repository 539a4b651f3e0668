"""Count how many small changes of the source the tests notice.

python scripts/mutants.py draws mutants of src/orchard, runs the tests that execute each changed
place, the cheapest first, and writes which mutants were killed, and by which test. A first run of
all tests finds out what each executes; it is kept beside the result and used again while neither
source nor tests change.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutant_sites import ROOMS, SOURCE, Mutant, draw_sample, locate

ROOT = Path(__file__).parent.parent
QUICK_SECONDS = 0.5
"""Tests below this run first; of the others, all of a file together, since they share fixtures."""
_ENVIRONMENT = ("ORCHARD_MUTANT_MODULE", "ORCHARD_MUTANT_FILE", "ORCHARD_MUTANT_SOURCE")


class _Loading(importlib.abc.MetaPathFinder):
    """Gives one module the source of a mutant, under the file name of the original."""

    def __init__(self, module: str, file: str, source: str) -> None:
        self.module, self.file, self.source = module, file, source

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        source = Path(self.source)

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return self.source_to_code(source.read_bytes(), self.path)

        return importlib.util.spec_from_file_location(
            fullname, self.file, loader=Loader(fullname, self.file)
        )


def load_mutant_of_environment() -> None:
    """Load what the environment names; every Python process that a test starts calls this."""
    if _ENVIRONMENT[0] in os.environ:
        sys.meta_path.insert(0, _Loading(*(os.environ[name] for name in _ENVIRONMENT)))


@dataclass(frozen=True)
class Setup:
    """What runs where.

    Attributes:
        repository: Whose source is changed.
        tests: Whose tests run.
        markers: For ``pytest -m``; None = as that repository's pyproject says.
        folder: For logs, temporary files and the mutants' source.
    """

    repository: Path
    tests: Path
    markers: str | None
    folder: Path


@dataclass(frozen=True)
class Covered:
    """What the tests execute.

    Attributes:
        digest: Of source and tests.
        seconds: Test to its duration, of those that pass.
        failed: Tests that fail without any mutant, which can kill none.
        lines: File to line to tests that execute it, themselves or through what they share.
    """

    digest: str
    seconds: dict[str, float]
    failed: list[str]
    lines: dict[str, dict[int, list[str]]]


class _Following:
    """A pytest plugin that tells coverage which test runs.

    What is made once and used by several tests (a fixture of a wider scope, a cached call) is
    followed under a name of its own, and belongs to every test that uses it.
    """

    def __init__(self, coverage: Any, folders: Sequence[Path]) -> None:
        self.coverage, self.folders = coverage, [f"{folder}{os.sep}" for folder in folders]
        self.stack: list[str] = []
        self.uses: dict[str, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        functools.cache = self._caching(functools.cache)

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        self._use(name)
        self.stack.append(name)
        self.coverage.switch_context(name)
        try:
            yield
        finally:
            self.stack.pop()
            self.coverage.switch_context(self.stack[-1] if self.stack else "")

    def _use(self, name: str) -> None:
        if self.stack:
            self.uses[self.stack[-1]].add(name)

    def _caching(self, cache: Callable[..., Any]) -> Any:
        def follow(function: Any) -> Any:
            file = getattr(getattr(function, "__code__", None), "co_filename", "")
            if not file.startswith(tuple(self.folders)):
                return cache(function)

            def name(args: Any, options: Any) -> str:
                return f"{function.__module__}.{function.__qualname__} {args!r} {options!r}"

            @cache
            def made(*args: Any, **options: Any) -> Any:
                with self._inside(name(args, options)):
                    return function(*args, **options)

            @functools.wraps(function)
            def used(*args: Any, **options: Any) -> Any:
                self._use(name(args, options))
                return made(*args, **options)

            used.cache_clear = made.cache_clear  # type: ignore[attr-defined]
            used.cache_info = made.cache_info  # type: ignore[attr-defined]
            return used

        return follow

    def tests_of(self, contexts: Collection[str]) -> dict[str, set[str]]:
        """Return context to the tests that it belongs to."""
        users: dict[str, set[str]] = defaultdict(set)
        for test in self.seconds:
            todo, seen = [test], set[str]()
            while todo:
                name = todo.pop()
                if name not in seen:
                    seen.add(name)
                    users[name].add(test)
                    todo += self.uses[name]
        return {context: users[context] for context in contexts}

    def hooks(self) -> Any:
        """Return the plugin."""
        import pytest

        def name_of(fixture: Any) -> str:
            return f"fixture {fixture.baseid} {fixture.argname}"

        class Hooks:
            @pytest.hookimpl(wrapper=True)
            def pytest_runtest_protocol(hooks, item: Any) -> Iterator[None]:
                shared = [
                    name_of(definitions[-1])
                    for definitions in item._fixtureinfo.name2fixturedefs.values()
                    if definitions[-1].scope != "function"
                ]
                file = item.nodeid.partition("::")[0]
                self.uses[item.nodeid] |= {*shared, f"import {file}"}
                with self._inside(item.nodeid):
                    return (yield)

            @pytest.hookimpl(wrapper=True)
            def pytest_fixture_setup(hooks, fixturedef: Any) -> Iterator[None]:
                if fixturedef.scope == "function":
                    return (yield)
                with self._inside(name_of(fixturedef)):
                    return (yield)

            @pytest.hookimpl(wrapper=True)
            def pytest_make_collect_report(hooks, collector: Any) -> Iterator[None]:
                with self._inside(f"import {collector.nodeid.partition('::')[0]}"):
                    return (yield)

            def pytest_runtest_logreport(hooks, report: Any) -> None:
                self.seconds[report.nodeid] += report.duration
                if report.outcome == "failed":
                    self.failed.add(report.nodeid)

        return Hooks()


class _Chosen:
    """A pytest plugin that keeps only the chosen tests, in their order, and notes who fails."""

    def __init__(self, tests: Sequence[str], note: Path) -> None:
        self.order = {test: place for place, test in enumerate(tests)}
        self.note = note

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        dropped = [item for item in items if item.nodeid not in self.order]
        items[:] = [item for item in items if item.nodeid in self.order]
        items.sort(key=lambda item: self.order[item.nodeid])
        config.hook.pytest_deselected(items=dropped)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "failed":
            with self.note.open("a") as stream:
                stream.write(f"{report.nodeid}\n")


def _warm() -> None:
    """Import what all tests need, once; nothing of the project."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.qwen2_moe  # noqa: F401


def _fork(setup: Setup, name: str, work: Callable[[list[str]], int]) -> int:
    """Run ``work``, given pytest's arguments, in a child process; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        log = os.open(setup.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        source = str(setup.repository / "src")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(setup.folder / "start"), source])
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(setup.folder / f"{name}.hypothesis")
        sys.path[:] = [source, *(p for p in sys.path if p not in (str(ROOT / "scripts"), source))]
        os.chdir(setup.tests)
        load_mutant_of_environment()
        options = ["-p", "no:cacheprovider", "--hypothesis-seed=0"]
        # Imported by the parent, so that assertions in it are not rewritten; it has none of ours.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        options += [f"--basetemp={setup.folder / f'{name}.tmp'}"]
        options += ["-m", setup.markers] if setup.markers is not None else []
        code = work(options)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _digest(setup: Setup) -> str:
    found = hashlib.sha256(repr((str(setup.tests), setup.markers)).encode())
    for folder in (setup.repository / SOURCE, setup.tests / "tests"):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def cover(setup: Setup, kept: Path) -> Covered:
    """Return what each test executes, from a run of all of them or from ``kept``.

    Raises:
        RuntimeError: The run has no result.
    """
    digest = _digest(setup)
    if kept.exists():
        held = json.loads(kept.read_text())
        if held["digest"] == digest:
            lines = {f: {int(n): t for n, t in own.items()} for f, own in held["lines"].items()}
            return Covered(digest, held["seconds"], held["failed"], lines)

    def work(options: list[str]) -> int:
        import coverage
        import pytest

        source = setup.repository / SOURCE
        measured = coverage.Coverage(data_file=None, source=[str(source)], config_file=False)
        following = _Following(measured, [source, setup.tests / "tests"])
        measured.start()
        pytest.main([*options, "-q"], plugins=[following.hooks()])
        measured.stop()
        data = measured.get_data()
        tests = following.tests_of(data.measured_contexts())
        lines = {}
        for file in sorted(data.measured_files()):
            lines[str(Path(file).relative_to(setup.repository))] = {
                line: sorted(set().union(*(tests[c] for c in contexts)) - following.failed)
                for line, contexts in data.contexts_by_lineno(file).items()
            }
        seconds = {t: round(s, 3) for t, s in following.seconds.items()}
        for test in following.failed:
            del seconds[test]
        found = Covered(digest, seconds, sorted(following.failed), lines)
        kept.write_text(json.dumps(asdict(found)))
        return 0

    _, status = os.waitpid(_fork(setup, "coverage", work), 0)
    if status:
        raise RuntimeError(f"the run of all tests must end, see {setup.folder / 'coverage.log'}")
    return cover(setup, kept)


def _importers(repository: Path) -> dict[str, set[str]]:
    """Return file to the files that import from it."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (repository / SOURCE).rglob("*.py"):
        file = str(path.relative_to(repository))
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module:
                target = repository / "src" / node.module.replace(".", "/")
                for module in (target, *(target / alias.name for alias in node.names)):
                    found[str(module.with_suffix(".py").relative_to(repository))].add(file)
    return found


def choose(mutant: Mutant, covered: Covered, importers: Mapping[str, set[str]]) -> list[str]:
    """Return the tests that can notice a mutant, in the order in which they run.

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

    def key(test: str) -> tuple[bool, float, str, float]:
        file, seconds = test.partition("::")[0], covered.seconds[test]
        return seconds >= QUICK_SECONDS, in_file[file], file, seconds

    return sorted(tests, key=key)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: killed, survived, timed out, not covered or not found."""

    mutant: Mutant
    verdict: str
    killer: str | None = None
    num_tests: int = 0
    seconds: float = 0.0


def _start(setup: Setup, mutant: Mutant | None, tests: Sequence[str], name: str) -> int:
    note = setup.folder / f"{name}.failed"
    note.unlink(missing_ok=True)
    environment = {}
    if mutant is not None:
        source = setup.folder / f"{name}.py"
        original = setup.repository / mutant.file
        source.write_bytes(mutant.apply(original.read_bytes()))
        module = ".".join(Path(mutant.file).relative_to("src").with_suffix("").parts)
        module = module.removesuffix(".__init__")
        environment = dict(zip(_ENVIRONMENT, (module, str(original), str(source)), strict=True))

    def work(options: list[str]) -> int:
        import pytest

        os.environ.update(environment)
        load_mutant_of_environment()
        stop = ["-x"] if mutant is not None else []
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return int(pytest.main([*options, *stop, "-q", *files], plugins=[_Chosen(tests, note)]))

    return _fork(setup, name, work)


def _failures(setup: Setup, name: str) -> list[str]:
    note = setup.folder / f"{name}.failed"
    return note.read_text().splitlines() if note.exists() else []


def try_mutants(
    setup: Setup, mutants: Sequence[Mutant], covered: Covered, jobs: int
) -> Iterator[Outcome]:
    """Yield what becomes of each mutant, as it is known."""
    importers = _importers(setup.repository)
    waiting = list(mutants)[::-1]
    running: dict[int, tuple[Mutant, list[str], float, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            tests = choose(mutant, covered, importers)
            if not tests:
                yield Outcome(mutant, "not covered")
                continue
            limit = 20 + 4 * sum(covered.seconds[test] for test in tests)
            pid = _start(setup, mutant, tests, f"mutant{mutant.number}")
            running[pid] = (mutant, tests, time.monotonic(), limit)
        time.sleep(0.05)
        for pid, (mutant, tests, started, limit) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - started
            if ended:
                verdict = "survived" if status == 0 else "killed"
            elif seconds > limit:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                verdict = "timed out"
            else:
                continue
            del running[pid]
            shutil.rmtree(setup.folder / f"mutant{mutant.number}.tmp", ignore_errors=True)
            killer = next(iter(_failures(setup, f"mutant{mutant.number}")), None)
            if verdict == "killed" and killer is None:
                killer = f"(exit status {os.waitstatus_to_exitcode(status)})"
            yield Outcome(mutant, verdict, killer, len(tests), round(seconds, 1))


def summarize(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Return the counts and the killed share of each room and of all; timed out is killed."""
    table: dict[str, dict[str, float]] = {}
    for room in (*ROOMS, "elsewhere", "all"):
        own = [o for o in outcomes if room in (o.mutant.room, "all") and o.verdict != "not found"]
        counts = Counter(o.verdict for o in own)
        if own:
            killed = counts["killed"] + counts["timed out"]
            table[room] = {**counts, "mutants": len(own), "killed_share": killed / len(own)}
    return table


def _write(out: Path, setup: Setup, outcomes: Sequence[Outcome], suspect: Sequence[str]) -> None:
    ordered = sorted(outcomes, key=lambda o: o.mutant.number)
    alive = ("survived", "not covered")
    record = {
        "summary": summarize(ordered),
        "not_found": [o.mutant.number for o in ordered if o.verdict == "not found"],
        "killers_that_fail_without_a_mutant": list(suspect),
        "survivors": [
            f"{o.mutant.number} {o.mutant.file}:{o.mutant.line} {o.mutant.what} "
            f"{o.mutant.old} -> {o.mutant.new} ({o.verdict}): {o.mutant.text}"
            for o in ordered
            if o.verdict in alive
        ],
        "mutants": [asdict(o) for o in ordered],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


def _sample(path: Path, setup: Setup, size: int, seed: int) -> list[Mutant]:
    """Read a sample, or draw it and write it there."""
    if not path.exists():
        drawn = draw_sample(setup.repository, size=size, seed=seed)
        path.write_text(json.dumps([asdict(mutant) for mutant in drawn], indent=1) + "\n")
    return [Mutant(**entry) for entry in json.loads(path.read_text())]


def main() -> None:
    """Try the mutants and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--size", type=int, default=150, help="mutants to draw")
    add("--seed", type=int, default=0, help="of the draw")
    add("--sample", type=Path, help="list of mutants: read where it exists, else written")
    add("--repository", type=Path, default=ROOT, help="checkout whose source is changed")
    add("--tests", type=Path, help="checkout whose tests run; default: the repository's own")
    add("--only", help="numbers of mutants, with commas")
    add("--markers", help="for pytest -m; default: as pyproject says")
    add("--jobs", type=int, default=2, help="processes at a time")
    add("--out", type=Path, default=ROOT / "runs" / "mutants.json", help="the result")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    out = options.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    repository = options.repository.resolve()
    tests = (options.tests or repository).resolve()
    setup = Setup(repository, tests, options.markers, out.with_suffix(".logs"))
    start = setup.folder / "start"
    start.mkdir(parents=True, exist_ok=True)
    (start / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(ROOT / 'scripts')!r})\n"
        "import mutants\nmutants.load_mutant_of_environment()\n"
    )
    sample = _sample(
        options.sample or out.with_suffix(".sample.json"), setup, options.size, options.seed
    )
    if options.only:
        numbers = {int(number) for number in options.only.split(",")}
        sample = [mutant for mutant in sample if mutant.number in numbers]
    _warm()
    covered = cover(setup, out.with_suffix(".coverage.json"))
    print(f"{len(covered.seconds)} tests, {len(covered.failed)} fail", flush=True)
    outcomes, found = [], []
    for mutant in sample:
        here = locate(mutant, repository)
        if here is None:
            outcomes.append(Outcome(mutant, "not found"))
        else:
            found.append(here)
    for outcome in try_mutants(setup, found, covered, options.jobs):
        outcomes.append(outcome)
        own = outcome.mutant
        print(
            f"{len(outcomes)}/{len(sample)} {outcome.verdict}: {own.number} {own.file}:"
            f"{own.line} {own.old!r} -> {own.new!r} {outcome.killer or ''} "
            f"{outcome.seconds} s",
            flush=True,
        )
        _write(out, setup, outcomes, [])
    killers = {o.killer for o in outcomes if o.killer and o.killer in covered.seconds}
    pid = _start(setup, None, sorted(killers), "killers")
    os.waitpid(pid, 0)
    _write(out, setup, outcomes, _failures(setup, "killers"))
    record = json.loads(out.read_text())
    for room, counts in record["summary"].items():
        print(room, json.dumps(counts))
    print(*record["survivors"], sep="\n")


if __name__ == "__main__":
    main()
