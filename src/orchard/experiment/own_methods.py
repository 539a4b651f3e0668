"""Methods of one's own: found by ``module:attribute`` or by an entry point, known by their source.

To find one is to let Python import it. So whoever takes names from elsewhere, as a site does from
its coordinator, asks its owner first; see ``deployment/site_recipe.py``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from orchard.experiment.parts import Method
from orchard.recipe.method_options import OWN_METHODS
from orchard.recipe.options import Recipe
from orchard.strategies.strategy import Strategy

GROUP = OWN_METHODS
"""The group of entry points that installed packages offer methods in."""

Transform: TypeAlias = Callable[[Strategy], Strategy]
"""The simplest method: a function from a strategy to a strategy."""

_NAMED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)", re.ASCII)


def import_from(folder: Path) -> None:
    """Let modules be found in ``folder`` too, after everything that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def offered() -> tuple[str, ...]:
    """Return the names of methods that installed packages offer; nothing is imported."""
    return tuple(dict.fromkeys(point.name for point in entry_points(group=GROUP)))


def find_own(name: str) -> Method:
    """Import the method that ``module:attribute``, or the name of an entry point, means.

    Raises:
        ValueError: There is none, or it is no method.
    """
    return _find(name)[0]


def own_digests(names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the file in which each own method is written; "" where there is none.

    Raises:
        ValueError: There is no such method.
    """
    return {name: _find(name)[1] for name in names}


# Kept as Python keeps modules: what runs is what was read first, and the digest is of that.
@functools.cache
def _find(name: str) -> tuple[Method, str]:
    module, attribute = _place(name)
    found: Any = _import(module, name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(
                f"strategy.name must name a method of module {module}, got {name}; "
                f"it has no {attribute}"
            )
        found = getattr(found, part)
    written = None if isinstance(found, Method) else found
    return as_method(found, name=name), _digest(written, sys.modules[module])


def as_method(found: object, *, name: str) -> Method:
    """Return what was found under a name as a method.

    Raises:
        ValueError: It is neither a ``Method`` nor a function of a strategy.
    """
    rule = "strategy.name must name a Method or a function from a Strategy to a Strategy"
    if isinstance(found, Method):
        return Method(found.about, found.source, found.part, _checked(found.apply, name=name))
    if not callable(found) or inspect.isclass(found):
        raise ValueError(f"{rule}, got {name}, which is a {type(found).__name__}")
    try:
        inspect.signature(found).bind(None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{rule}, got {name}, which cannot be called with one argument ({error}); "
            "give its other arguments defaults"
        ) from None
    about = (inspect.getdoc(found) or "").partition("\n")[0].rstrip(".")
    apply = _checked(lambda strategy, recipe, num_clients: found(strategy), name=name)
    return Method(about, "your own", "own", apply)


def passed_name(strategy: Strategy | Transform) -> str:
    """Return by what name a method that was passed as an object is recorded.

    A function of a module is recorded as ``module:name``, by which a recipe can name it too. Other
    objects have names that no recipe can find: a function with arguments bound by
    ``functools.partial``, one inside another, and a ``Strategy``, which is called by those of its
    answers that are not FedAvg's.
    """
    if not isinstance(strategy, Strategy):
        return _qualified(strategy)
    fedavg = Strategy()
    own = [getattr(strategy, entry.name) for entry in fields(Strategy)]
    usual = {_qualified(getattr(fedavg, entry.name)) for entry in fields(Strategy)}
    names = dict.fromkeys(name for name in map(_qualified, own) if name not in usual)
    return "+".join(names) or _qualified(Strategy)


def passed_digest(function: Transform) -> str:
    """Return the digest of a function that was passed, as ``own_digests`` does."""
    return _digest(function, None)


def _place(name: str) -> tuple[str, str]:
    """Return module and attribute of a name."""
    named = _NAMED.fullmatch(name)
    if named:
        return named[1], named[2]
    if ":" in name:
        raise ValueError(
            f"strategy.name must name methods as module:attribute, got {name}; write a dotted "
            "module name without folders and .py; what was passed to run as an object is resumed "
            "by passing it again"
        )
    points = {(point.module, point.attr) for point in entry_points(group=GROUP, name=name)}
    if len(points) != 1:
        values = " and ".join(sorted(":".join(point) for point in points))
        raise ValueError(
            f"strategy.name must mean one method, got {name} for {values or 'nothing'}; "
            "see orchard ls, or write module:attribute"
        )
    return points.pop()


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"strategy.name must name a module that can be found, got {name}; start in the "
                f"folder of {module.partition('.')[0]}.py, or install it"
            ) from None
        failure: BaseException = error
    except (Exception, SystemExit) as error:
        failure = error
    raise ValueError(
        f"strategy.name must name a module that can be imported, got {name} "
        f"({_said(failure)}); python -c 'import {module}' shows where"
    ) from failure


def _checked(
    apply: Callable[[Strategy, Recipe, int], Strategy], *, name: str
) -> Callable[[Strategy, Recipe, int], Strategy]:
    """Let a foreign method fail as bad input does."""

    def checked(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
        try:
            made: object = apply(strategy, recipe, num_clients)
        except Exception as error:
            raise ValueError(
                f"strategy.name must name a method that can be put on, got {name} "
                f"({_said(error)}); mend it"
            ) from error
        if not isinstance(made, Strategy):
            raise ValueError(
                f"strategy.name must name a method that returns a Strategy, got {name}, which "
                f"returns a {type(made).__name__}; end it with return replace(strategy, ...)"
            )
        if made.aggregate != strategy.aggregate and recipe.server.aggregation != "mean":
            raise ValueError(
                f"server.aggregation must be mean with {name}, which aggregates in its own way, "
                f"got {recipe.server.aggregation}"
            )
        return made

    return checked


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _digest(found: object, module: ModuleType | None) -> str:
    while isinstance(found, functools.partial):
        found = found.func
    for thing in (found, module):
        try:
            file = inspect.getsourcefile(inspect.unwrap(thing))  # type: ignore[arg-type]
        except TypeError:  # a callable object, whose class may be anywhere
            continue
        if file and Path(file).is_file():
            return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    try:  # a cell of a notebook is in no file, and Python still knows its lines
        return hashlib.sha256(inspect.getsource(inspect.unwrap(found)).encode()).hexdigest()  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""


def _qualified(value: object) -> str:
    if isinstance(value, functools.partial):
        bound = [*map(repr, value.args), *(f"{key}={v!r}" for key, v in value.keywords.items())]
        return f"{_qualified(value.func)}({', '.join(bound)})"
    named = value if hasattr(value, "__qualname__") else type(value)
    module = str(getattr(named, "__module__", None) or "__main__")
    return f"{_script_name() if module == '__main__' else module}:{named.__qualname__}"


def _script_name() -> str:
    """Return what the program that was started would be imported as."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    return Path(file).stem if file else "__main__"
