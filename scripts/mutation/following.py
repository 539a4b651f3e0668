"""Which tests execute which line, from one run of all of them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mutation.processes import Options, Setup, fork
from mutation.sites import SOURCE


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


class Following:
    """A plugin of pytest that tells coverage which test runs.

    What is made once and used by several tests (a fixture of a wider scope, a cached call, what a
    module of tests does on import) has a name of its own, and belongs to every test that uses it.
    """

    def __init__(self, switch_context: Callable[[str], object], folders: Sequence[Path]) -> None:
        """Follow tests, and calls that are cached in files of these folders."""
        self.switch_context = switch_context
        self.folders = tuple(f"{folder}{os.sep}" for folder in folders)
        self.stack: list[str] = []
        self.uses: dict[str, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Run what belongs to ``name``, which whatever runs now uses."""
        self.use(name)
        self.stack.append(name)
        self.switch_context(name)
        try:
            yield
        finally:
            self.stack.pop()
            self.switch_context(self.stack[-1] if self.stack else "")

    def use(self, name: str) -> None:
        """Note that whatever runs now uses ``name``."""
        if self.stack:
            self.uses[self.stack[-1]].add(name)

    def caching(self, cache: Callable[..., Any]) -> Callable[[Any], Any]:
        """Return what takes the place of ``functools.cache``."""

        def follow(function: Any) -> Any:
            file = getattr(getattr(function, "__code__", None), "co_filename", "")
            if not file.startswith(self.folders):
                return cache(function)

            def name(args: Any, options: Any) -> str:
                return f"{function.__module__}.{function.__qualname__} {args!r} {options!r}"

            @cache
            def made(*args: Any, **options: Any) -> Any:
                with self.inside(name(args, options)):
                    return function(*args, **options)

            @functools.wraps(function)
            def used(*args: Any, **options: Any) -> Any:
                self.use(name(args, options))
                return made(*args, **options)

            used.cache_clear = made.cache_clear  # type: ignore[attr-defined]
            used.cache_info = made.cache_info  # type: ignore[attr-defined]
            return used

        return follow

    def tests_of(self, contexts: Collection[str]) -> dict[str, set[str]]:
        """Return context to the passing tests that it belongs to."""
        users: dict[str, set[str]] = defaultdict(set)
        for test in self.seconds.keys() - self.failed:
            todo, seen = [test], set[str]()
            while todo:
                name = todo.pop()
                if name not in seen:
                    seen.add(name)
                    users[name].add(test)
                    todo += self.uses.get(name, ())
        return {context: users[context] for context in contexts}

    def hooks(self) -> Any:
        """Return the plugin."""
        import pytest

        def name_of(fixture: Any) -> str:
            return f"fixture {fixture.baseid} {fixture.argname}"

        class Hooks:
            @pytest.hookimpl(wrapper=True)
            def pytest_runtest_protocol(hooks, item: Any) -> Iterator[None]:
                for definitions in item._fixtureinfo.name2fixturedefs.values():
                    if definitions[-1].scope != "function":
                        self.uses[item.nodeid].add(name_of(definitions[-1]))
                self.uses[item.nodeid].add(f"import {item.nodeid.partition('::')[0]}")
                with self.inside(item.nodeid):
                    return (yield)

            @pytest.hookimpl(wrapper=True)
            def pytest_fixture_setup(hooks, fixturedef: Any) -> Iterator[None]:
                if fixturedef.scope == "function":
                    return (yield)
                with self.inside(name_of(fixturedef)):
                    return (yield)

            @pytest.hookimpl(wrapper=True)
            def pytest_make_collect_report(hooks, collector: Any) -> Iterator[None]:
                with self.inside(f"import {collector.nodeid.partition('::')[0]}"):
                    return (yield)

            def pytest_runtest_logreport(hooks, report: Any) -> None:
                self.seconds[report.nodeid] += report.duration
                if report.outcome == "failed":
                    self.failed.add(report.nodeid)

        return Hooks()


def _digest(setup: Setup) -> str:
    found = hashlib.sha256(repr((str(setup.tests), setup.markers)).encode())
    found.update((setup.tests / "pyproject.toml").read_bytes())
    for folder in (setup.repository / SOURCE, setup.tests / "tests"):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def _read(kept: Path, digest: str) -> Covered | None:
    if not kept.exists():
        return None
    held = json.loads(kept.read_text())
    if held["digest"] != digest:
        return None
    lines = {file: {int(n): t for n, t in own.items()} for file, own in held["lines"].items()}
    return Covered(digest, held["seconds"], held["failed"], lines)


def cover(setup: Setup, kept: Path) -> Covered:
    """Return what each test executes: from ``kept`` while it is true, else from a run of all.

    Raises:
        RuntimeError: The run has no result.
    """
    digest = _digest(setup)
    if found := _read(kept, digest):
        return found

    def work(options: Options) -> int:
        import coverage
        import pytest

        source = setup.repository / SOURCE
        measured = coverage.Coverage(data_file=None, source=[str(source)], config_file=False)
        following = Following(measured.switch_context, [source, setup.tests / "tests"])
        functools.cache = following.caching(functools.cache)
        measured.start()
        pytest.main(options, plugins=[following.hooks()])
        measured.stop()
        data = measured.get_data()
        tests = following.tests_of(data.measured_contexts())
        lines = {
            str(Path(file).relative_to(setup.repository)): {
                line: sorted(set[str]().union(*(tests[context] for context in contexts)))
                for line, contexts in data.contexts_by_lineno(file).items()
            }
            for file in sorted(data.measured_files())
        }
        seconds = {
            test: round(seconds, 3)
            for test, seconds in following.seconds.items()
            if test not in following.failed
        }
        kept.write_text(
            json.dumps(asdict(Covered(digest, seconds, sorted(following.failed), lines)))
        )
        return 0

    _, status = os.waitpid(fork(setup, "coverage", work), 0)
    found = _read(kept, digest)
    if status or found is None:
        raise RuntimeError(f"the run of all tests must end, see {setup.folder / 'coverage.log'}")
    return found
