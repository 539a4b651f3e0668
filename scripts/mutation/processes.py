"""Runs of pytest in processes that find torch and transformers imported already."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutation.loading import ENVIRONMENT, load_mutant
from mutation.sites import Mutant

SCRIPTS = Path(__file__).parent.parent
Options = list[str]


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


def warm() -> None:
    """Import what most tests need, once: nothing of the project, and no plugin of pytest."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.qwen2_moe  # noqa: F401


def fork(setup: Setup, name: str, work: Callable[[Options], int]) -> int:
    """Start a process that runs ``work``, given options for pytest; return its process id."""
    start = setup.folder / "start"
    start.mkdir(parents=True, exist_ok=True)
    (start / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(SCRIPTS)!r})\n"
        "from mutation.loading import load_mutant\nload_mutant()\n"
    )
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
        os.environ["PYTHONPATH"] = os.pathsep.join([str(start), source])
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(setup.folder / f"{name}.hypothesis")
        sys.path[:] = [source, *(path for path in sys.path if path not in (str(SCRIPTS), source))]
        os.chdir(setup.tests)
        options = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        options += [f"--basetemp={setup.folder / f'{name}.tmp'}"]
        # Of what the parent has imported, no assertion is rewritten; none in it is ours.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        options += ["-m", setup.markers] if setup.markers is not None else []
        code = work(options)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Chosen:
    """A plugin of pytest that keeps only the chosen tests, in their order, and notes who fails."""

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


def start_tests(setup: Setup, name: str, tests: Sequence[str], mutant: Mutant | None = None) -> int:
    """Start a process that runs tests, with a mutant up to the first failure.

    Returns:
        Its process id; it exits with pytest's status.
    """
    note = setup.folder / f"{name}.failed"
    note.unlink(missing_ok=True)
    environment: dict[str, str] = {}
    if mutant is not None:
        source = setup.folder / f"{name}.py"
        original = setup.repository / mutant.file
        source.write_bytes(mutant.apply(original.read_bytes()))
        parts = Path(mutant.file).relative_to("src").with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        environment = dict(zip(ENVIRONMENT, (module, str(original), str(source)), strict=True))

    def work(options: Options) -> int:
        import pytest

        os.environ.update(environment)
        load_mutant()
        stop = ["-x"] if mutant is not None else []
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        return int(pytest.main([*options, *stop, *files], plugins=[_Chosen(tests, note)]))

    return fork(setup, name, work)


def failures(setup: Setup, name: str) -> list[str]:
    """Return the tests that failed in a process, in their order."""
    note = setup.folder / f"{name}.failed"
    return note.read_text().splitlines() if note.exists() else []
