"""Modules of one's own for tests: written to a folder, found by Python, forgotten at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchard.experiment import own_methods

PULLED = """
from orchard.experiment.parts import Method
from orchard.strategies.fedprox import fedprox

pulled = Method("pulled", "", "objective", lambda s, r, n: fedprox(s, mu=r.strategy.prox_mu))


def pulled_hard(strategy):
    '''Clients are pulled hard.'''
    return fedprox(strategy, mu=5.0)
"""


def forget(*modules: str) -> None:
    """Let Python, and what remembers methods, import these modules again."""
    for name in modules:
        sys.modules.pop(name, None)
    own_methods._find.cache_clear()


@contextmanager
def written(folder: Path, **modules: str) -> Iterator[None]:
    """Have modules of these names and sources in ``folder``, where Python finds them."""
    before = list(sys.path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path[:] = before
        forget(*modules)


def offer(folder: Path, *, package: str = "mine", **points: str) -> None:
    """Make ``folder`` hold an installed package that offers methods as entry points."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join([f"[{own_methods.GROUP}]", *lines]) + "\n")
