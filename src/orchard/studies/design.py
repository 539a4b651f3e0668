"""A study's file: which methods, on which seeds, beside which reference, and how they are tuned.

Read and checked before any data or model is.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchard.catalog import find_recipe
from orchard.recipe.options import Recipe
from orchard.recipe.reading import flatten, format_value, known_options, read_recipe, words

# What a study decides itself: one model per run, its scores by example, and one thread.
_FIXED: Mapping[str, Any] = MappingProxyType(
    {"evaluation.models": "personal", "evaluation.keep_answers": True, "model.num_threads": 1}
)
_KEYS = ("title", "reference", "seeds", "set", "grid", "method", "tuning")
_METHOD_KEYS = ("name", "recipe", "set")
_TUNING_KEYS = ("seeds", "metric", "validation_size", "grid")
_LOWER = ("loss",)  # metrics of which less is better


@dataclass(frozen=True)
class Entry:
    """One method of a study.

    Attributes:
        name: How it is called there.
        recipe: The file that it begins with.
        changes: Its own values, by dotted key.
    """

    name: str
    recipe: Path
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Tuning:
    """How options are chosen for each method: the same grid, so the same number of runs for all.

    Attributes:
        grid: Dotted key to the values that are tried.
        seeds: Of the runs that choose.
        metric: By which the mean over clients and seeds chooses.
        validation_size: What of each client's training rows is measured, see
            ``data.validation_size``; test rows are not read.
    """

    grid: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...]
    metric: str
    validation_size: float

    @property
    def choices(self) -> tuple[Mapping[str, Any], ...]:
        """All that are tried, in the order of the grid."""
        return _product(self.grid)

    @property
    def is_higher_better(self) -> bool:
        """Whether the largest value is chosen."""
        return self.metric not in _LOWER


@dataclass(frozen=True)
class Design:
    """A study as its file says it, with what the command line adds.

    Attributes:
        title: What it asks.
        file: Where it was read.
        entries: Its methods.
        reference: The name of the method that others are compared with.
        seeds: Of every method's runs.
        common: Values for all methods, by dotted key.
        grid: Dotted key to its values: a table for each combination.
        tuning: None = recipes run as they are.
    """

    title: str
    file: Path
    entries: tuple[Entry, ...]
    reference: str
    seeds: tuple[int, ...]
    common: Mapping[str, Any]
    grid: Mapping[str, tuple[Any, ...]]
    tuning: Tuning | None

    @property
    def cells(self) -> tuple[Mapping[str, Any], ...]:
        """The combinations of the grid."""
        return _product(self.grid)

    def recipe(
        self, entry: Entry, cell: Mapping[str, Any], seed: int, chosen: Mapping[str, Any]
    ) -> Recipe:
        """Return the recipe of one run.

        Args:
            entry: The method.
            cell: Of the grid.
            seed: Of the run.
            chosen: What tuning chose, or tries.

        Raises:
            FileNotFoundError: Its file is not there.
            ValueError: A key or a value is wrong, or one of the method's own has no effect.
        """
        common = {**self.common, **cell, **chosen, **_FIXED, "seed": seed}
        own = {key: value for key, value in entry.changes.items() if key not in chosen}
        resolved = read_recipe(entry.recipe, changes=own, common=common, source=str(self.file))
        return resolved.recipe

    def tuning_recipe(
        self, entry: Entry, cell: Mapping[str, Any], seed: int, tried: Mapping[str, Any]
    ) -> Recipe:
        """Return the recipe of a run that chooses: its metric alone, on validation rows."""
        assert self.tuning is not None
        recipe = self.recipe(entry, cell, seed, tried)
        return replace(
            recipe,
            data=replace(recipe.data, validation_size=self.tuning.validation_size),
            evaluation=replace(
                recipe.evaluation,
                metrics=self.tuning.metric,
                best="",
                retention_path="",
                other_clients=0,
            ),
        )


def cell_name(cell: Mapping[str, Any]) -> str:
    """Return what a combination is called: keys without their sections, and values."""
    return ", ".join(f"{key.rpartition('.')[2]} = {value}" for key, value in cell.items())


def read_design(path: Path, overrides: Sequence[str] = ()) -> Design:
    """Read and check a study's file.

    Args:
        path: TOML.
        overrides: ``key=value`` for all methods, which win over the file's.

    Raises:
        FileNotFoundError: The file, or a recipe in it, is not there.
        ValueError: Something in it is wrong; the message says what.
    """
    if not path.is_file():
        raise FileNotFoundError(f"study must be an existing file, got {path}; name a TOML file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"study must be valid TOML, got {path} with: {error}; mend it") from error
    _check_keys(table, _KEYS, "study")
    entries = _entries(table.get("method"), path)
    names = [entry.name for entry in entries]
    reference = table.get("reference", names[0])
    if reference not in names:
        raise ValueError(
            f"reference must be of {', '.join(names)}, got {reference}; name one of the methods"
        )
    common = _settings(table.get("set", {}), "set")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(
                f"an override must be key=value, got {override}; for example model.path=FOLDER"
            )
        common |= _settings({key: _from_text(key, text)}, "an override")
    design = Design(
        title=str(table.get("title", path.stem)),
        file=path,
        entries=entries,
        reference=reference,
        seeds=_seeds(table.get("seeds"), "seeds"),
        common=common,
        grid=_grid(table.get("grid", {}), "grid"),
        tuning=_tuning(table["tuning"]) if "tuning" in table else None,
    )
    _check_recipes(design)
    return design


def _entries(tables: Any, path: Path) -> tuple[Entry, ...]:
    if not isinstance(tables, list) or not tables:
        raise ValueError("method must be given, got none; add a table [[method]] for each")
    entries: list[Entry] = []
    for table in tables:
        _check_keys(table, _METHOD_KEYS, "method")
        recipe = str(table.get("recipe", ""))
        if not recipe:
            raise ValueError(f"recipe must be given for {table.get('name', 'a method')}, got none")
        name = str(table.get("name", Path(recipe).stem))
        if name in [entry.name for entry in entries]:
            raise ValueError(f"method must have a name of its own, got {name} twice; give a name")
        beside = path.parent / recipe
        found = beside if beside.is_file() else find_recipe(Path(recipe))
        if not found.is_file():
            raise FileNotFoundError(
                f"recipe of {name} must be a file or the name of a packaged recipe, got {recipe}; "
                "orchard ls shows the recipes"
            )
        entries.append(Entry(name, found, _settings(table.get("set", {}), f"set of {name}")))
    return tuple(entries)


def _tuning(table: Mapping[str, Any]) -> Tuning:
    _check_keys(table, _TUNING_KEYS, "tuning")
    grid = _grid(table.get("grid", {}), "tuning.grid")
    if not grid:
        raise ValueError("tuning.grid must name options and values, got none; add client.lr")
    size = table.get("validation_size")
    if isinstance(size, bool) or not isinstance(size, int | float) or size <= 0:
        raise ValueError(f"tuning.validation_size must be above 0, got {size}; give 20, or 0.2")
    metric = str(table.get("metric", "loss"))
    return Tuning(grid, _seeds(table.get("seeds"), "tuning.seeds"), metric, float(size))


def _seeds(values: Any, name: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name} must be a list of whole numbers, got {values or 'none'}")
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} must be whole numbers from 0 on, got {value!r}")
    return _different(values, name)


def _grid(table: Any, name: str) -> dict[str, tuple[Any, ...]]:
    grid = {}
    for key, values in _settings(table, name).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key} in {name} must be a list of values, got {values}")
        grid[key] = _different(values, f"{key} in {name}")
    return grid


def _different(values: Sequence[Any], name: str) -> tuple[Any, ...]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{name} must have each value once, got {value} twice; drop one")
    return tuple(values)


def _settings(table: Any, name: str) -> dict[str, Any]:
    """Return the options of a table by their dotted keys.

    Raises:
        ValueError: It is none, or a key is unknown, or what a study decides.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} must be a table of options, got {table}")
    found, known = flatten(table), known_options()
    for key in found:
        if key == "seed" or key in _FIXED or key == "data.validation_size":
            raise ValueError(f"{name} must not have {key}, got one; a study gives it to its runs")
        if key not in known:
            raise ValueError(
                f"{name} must have known options, got {key}; orchard show RECIPE --all lists them"
            )
    return found


def _check_keys(table: Any, known: Sequence[str], name: str) -> None:
    if not isinstance(table, Mapping):
        raise ValueError(f"{name} must be a table, got {table}")
    for key in table:
        if key not in known:
            raise ValueError(f"{name} must have the keys {', '.join(known)}, got {key}; mend it")


def _from_text(key: str, text: str) -> Any:
    kind = known_options()[key][0] if key in known_options() else str
    if kind is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _product(grid: Mapping[str, Sequence[Any]]) -> tuple[Mapping[str, Any], ...]:
    combinations = itertools.product(*grid.values())
    return tuple(dict(zip(grid, values, strict=True)) for values in combinations)


def _check_recipes(design: Design) -> None:
    """Check every recipe of a study, and that no two methods are one.

    Raises:
        ValueError: A value is wrong; or two recipes are the same.
    """
    first, tuning = design.seeds[0], design.tuning
    for cell in design.cells:
        seen: dict[Recipe, str] = {}
        for entry in design.entries:
            try:
                recipe = design.recipe(entry, cell, first, {})
                for tried in tuning.choices if tuning else ():
                    design.recipe(entry, cell, first, tried)
            except ValueError as error:
                raise ValueError(f"{error} (method {entry.name})") from error
            if recipe in seen:
                raise ValueError(
                    f"methods must differ, got {seen[recipe]} and {entry.name} with the same "
                    "recipe; drop one"
                )
            seen[recipe] = entry.name
            if tuning and tuning.metric not in words(recipe.evaluation.metrics):
                raise ValueError(
                    f"tuning.metric must be of evaluation.metrics, got {tuning.metric}, and "
                    f"{entry.name} has {format_value(recipe.evaluation.metrics)}"
                )
