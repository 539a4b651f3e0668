"""A study's runs: what is missing is run, what was cut off goes on, what is there is used.

A run's folder is named by the digests of its recipe, its data and its base, so a result is used
exactly where all three are the same, and nothing is written over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from orchard.experiment.data_record import data_digest
from orchard.experiment.holdings import build_federation, read_elsewhere
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.run_folder import recipe_digest
from orchard.recipe.options import Recipe
from orchard.recipe.reading import parse_recipe, to_toml
from orchard.reports import read_result
from orchard.results import write_atomically
from orchard.studies.design import Design, Entry, cell_name

DIVERGED = "diverged.txt"
_WATCH_SECONDS = 2.0


@dataclass(frozen=True)
class Made:
    """One run of a study that is there.

    Attributes:
        folder: Of the run.
        result: Its ``result.json``; empty where its loss was no number.
    """

    folder: Path
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Chosen:
    """What tuning chose for one method in one combination of the grid.

    Attributes:
        options: The values.
        tried: All values that were tried, with the mean of the metric; infinity = no number.
        is_at_the_end: Whether the best value of an option is the first or the last of several.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    tried: tuple[tuple[Mapping[str, Any], float], ...] = ()
    is_at_the_end: bool = False


@dataclass(frozen=True)
class Column:
    """The runs of one method in one combination of the grid, by seed.

    Attributes:
        chosen: What tuning chose.
        runs: Seed to run, of those that are there.
    """

    chosen: Chosen
    runs: Mapping[int, Made]


@dataclass
class Progress:
    """What a study has so far.

    Attributes:
        base_digest: Of the base.
        num_runs: How many runs the study has in all.
        columns: Name of the combination and of the method to their runs.
        num_done: Runs that are there.
    """

    base_digest: str
    num_runs: int
    columns: dict[tuple[str, str], Column] = field(default_factory=dict)
    num_done: int = 0


def run_study(
    design: Design,
    out: Path,
    *,
    jobs: int = 1,
    tell: Callable[[str], None],
    changed: Callable[[Progress], None],
) -> Progress:
    """Run what a study lacks.

    Args:
        design: The study.
        out: Its folder.
        jobs: So many runs at once, a process with one thread each.
        tell: Told of every run.
        changed: Called whenever there is more to report.

    Raises:
        FileNotFoundError: Data or a model are not there.
        ValueError: Something does not fit; no weight has been loaded then.
        Exception: Whatever a run raises, but for a loss in tuning that is no number.
    """
    runner = _Runner(design, out, jobs, tell)
    progress = Progress(runner.base_digest, num_runs(design))
    with runner.opened():
        for cell in design.cells:
            chosen = _tune(design, cell, runner, progress)
            wanted = {
                (entry.name, seed): design.recipe(entry, cell, seed, chosen[entry.name].options)
                for seed in design.seeds
                for entry in design.entries
            }
            found: dict[tuple[str, int], Made] = {}
            for (name, seed), made in runner.make(wanted, cell_name(cell)):
                found[name, seed] = made
                progress.num_done += 1
                own = {s: found[name, s] for s in design.seeds if (name, s) in found}
                progress.columns[cell_name(cell), name] = Column(chosen[name], own)
                changed(progress)
    return progress


def num_runs(design: Design) -> int:
    """Return how many runs a study has, those that choose included."""
    tuning = design.tuning
    tried = len(tuning.choices) * len(tuning.seeds) if tuning else 0
    return len(design.cells) * len(design.entries) * (tried + len(design.seeds))


def check_study(design: Design) -> None:
    """Check every method of a study against its data and model; reads no weight.

    Raises:
        FileNotFoundError: Data or a model are not there.
        ValueError: Something does not fit.
    """
    for cell in design.cells:
        for entry in design.entries:
            tried = design.tuning.choices[0] if design.tuning else {}
            try:
                prepare_experiment(design.recipe(entry, cell, design.seeds[0], tried))
                if design.tuning:
                    first = design.tuning.seeds[0]
                    prepare_experiment(design.tuning_recipe(entry, cell, first, tried))
            except ValueError as error:
                raise ValueError(f"{error} (method {entry.name})") from error


def _tune(
    design: Design, cell: Mapping[str, Any], runner: _Runner, progress: Progress
) -> dict[str, Chosen]:
    """Return what is chosen for each method, by runs on validation rows."""
    tuning = design.tuning
    if tuning is None:
        return {entry.name: Chosen() for entry in design.entries}
    wanted = {
        (entry.name, seed, number): design.tuning_recipe(entry, cell, seed, tried)
        for entry in design.entries
        for number, tried in enumerate(tuning.choices)
        for seed in tuning.seeds
    }
    values: dict[tuple[str, int, int], float] = {}
    for key, made in runner.make(wanted, f"{cell_name(cell)} tuning", may_diverge=True):
        progress.num_done += 1
        values[key] = math.inf
        if made.result:
            mean = made.result["summary"]["personal"][tuning.metric]["mean"]
            values[key] = -mean if tuning.is_higher_better else mean
    return {entry.name: _choose(design, entry, values) for entry in design.entries}


def _choose(design: Design, entry: Entry, values: Mapping[tuple[str, int, int], float]) -> Chosen:
    tuning = design.tuning
    assert tuning is not None
    means = [
        fmean(values[entry.name, seed, number] for seed in tuning.seeds)
        for number in range(len(tuning.choices))
    ]
    if not any(map(math.isfinite, means)):
        raise ValueError(
            f"tuning must leave a value with which {entry.name} trains, got none of "
            f"{len(means)}; add smaller learning rates to tuning.grid"
        )
    best = tuning.choices[means.index(min(means))]
    at_the_end = any(
        len(tried) > 2 and best[key] in (tried[0], tried[-1]) for key, tried in tuning.grid.items()
    )
    sign = -1 if tuning.is_higher_better else 1
    tried = tuple((own, sign * mean) for own, mean in zip(tuning.choices, means, strict=True))
    return Chosen(best, tried, at_the_end)


class _Runner:
    """Makes runs, in this process or in several."""

    def __init__(self, design: Design, out: Path, jobs: int, tell: Callable[[str], None]) -> None:
        self._out, self._jobs, self._tell = out, jobs, tell
        self._data: dict[str, str] = {}
        self._pool: ProcessPoolExecutor | None = None
        self._num_told, self._num_runs = 0, num_runs(design)
        recipe = design.recipe(design.entries[0], design.cells[0], design.seeds[0], {})
        self.base_digest = _base_digest(recipe)
        self._base_of = {_model_key(recipe): self.base_digest}

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have processes while the context lasts, where several runs go at once."""
        if self._jobs == 1:
            yield
            return
        with ProcessPoolExecutor(
            self._jobs,
            mp_context=get_context("spawn"),
            initializer=_begin_process,
            initargs=(os.getpid(),),
        ) as self._pool:
            try:
                yield
            except BaseException:
                self._pool.shutdown(wait=False, cancel_futures=True)
                raise

    def make(
        self, wanted: Mapping[Any, Recipe], about: str, *, may_diverge: bool = False
    ) -> Iterator[tuple[Any, Made]]:
        """Yield the runs of recipes as they are there, made or found."""
        missing: dict[Any, Path] = {}
        for key, recipe in wanted.items():
            folder = self._folder(key, recipe)
            if (made := _read(folder)) is not None:
                self._say(key, about, made, seconds=None)
                yield key, made
            elif self._pool is None:
                started = time.monotonic()
                _run_one(to_toml(recipe), folder, may_diverge)
                yield key, self._done(key, about, folder, time.monotonic() - started)
            else:
                missing[key] = folder
        if self._pool is not None and missing:
            started = time.monotonic()
            futures: dict[Future[None], Any] = {
                self._pool.submit(_run_one, to_toml(wanted[key]), folder, may_diverge): key
                for key, folder in missing.items()
            }
            for future in as_completed(futures):
                future.result()
                key = futures[future]
                yield key, self._done(key, about, missing[key], time.monotonic() - started)

    def _done(self, key: Any, about: str, folder: Path, seconds: float) -> Made:
        made = _read(folder)
        assert made is not None, f"{folder} has no result"
        self._say(key, about, made, seconds=seconds)
        return made

    def _say(self, key: Any, about: str, made: Made, *, seconds: float | None) -> None:
        self._num_told += 1
        summary = made.result.get("summary", {}).get("personal", {})
        scores = ", ".join(f"{metric} {own['mean']:.4f}" for metric, own in summary.items())
        how = "there" if seconds is None else f"{seconds:.0f} s"
        place = " ".join(str(part) for part in (about, *key) if part != "")
        self._tell(f"{self._num_told}/{self._num_runs} {place}: {scores or 'no number'} ({how})")

    def _folder(self, key: Any, recipe: Recipe) -> Path:
        parts = (recipe_digest(recipe), self._data_digest(recipe), self._digest_of_base(recipe))
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        name = re.sub(r"[^a-z0-9]+", "-", str(key[0]).lower()).strip("-")[:32]
        return self._out / "runs" / f"{name}-seed{recipe.seed}-{digest}"

    def _digest_of_base(self, recipe: Recipe) -> str:
        key = _model_key(recipe)
        if key not in self._base_of:
            self._base_of[key] = _base_digest(recipe)
        return self._base_of[key]

    def _data_digest(self, recipe: Recipe) -> str:
        strategy, evaluation = recipe.strategy, recipe.evaluation
        data = (recipe.seed, recipe.data, evaluation.max_examples, evaluation.retention_path)
        parts = (*data, evaluation.shots, evaluation.shots_path)
        key = repr((parts, strategy.calibration, strategy.calibration_path))
        if key not in self._data:
            elsewhere = read_elsewhere(recipe)
            self._data[key] = data_digest(
                build_federation(recipe),
                retention=elsewhere.retention,
                calibration=elsewhere.calibration,
            ).overall
        return self._data[key]


def _model_key(recipe: Recipe) -> str:
    return repr((recipe.model.path, recipe.model.dtype))


def _base_digest(recipe: Recipe) -> str:
    from orchard.models.stored.loading import load_base, threads

    with threads(1):
        model = recipe.model
        return load_base(model.path, dtype=model.dtype, device=model.device).digest


def _read(folder: Path) -> Made | None:
    if (folder / DIVERGED).exists():
        return Made(folder, {})
    if not (folder / "result.json").is_file():
        return None
    return Made(folder, read_result(folder))


def _run_one(recipe: str, folder: Path, may_diverge: bool) -> None:
    """Run a recipe in a folder, or go on with what is there."""
    from orchard.engine.progress import Silent
    from orchard.experiment.running import run_experiment

    experiment = prepare_experiment(parse_recipe(recipe))
    try:
        run_experiment(experiment, folder=folder, reporter=Silent(), warn=lambda text: None)
    except FloatingPointError as error:
        if not may_diverge:
            raise
        write_atomically(folder / DIVERGED, f"{error}\n".encode())


def _begin_process(parent: int) -> None:
    """Leave with the parent, whatever ended it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(frozen=True)
class Compared:
    """A method beside the reference, in one combination of the grid.

    Attributes:
        cell: The combination.
        method: Its name in the study.
        own: Its runs.
        reference: The reference's.
        seeds: Of which both have a run; at least one.
    """

    cell: str
    method: str
    own: Column
    reference: Column
    seeds: tuple[int, ...]


def compared(design: Design, progress: Progress) -> Iterator[Compared]:
    """Yield what there is to compare, in each combination the reference with itself first."""
    others = [entry.name for entry in design.entries if entry.name != design.reference]
    for cell in map(cell_name, design.cells):
        reference = progress.columns.get((cell, design.reference))
        if reference is None:
            continue
        for name in (design.reference, *others):
            own = progress.columns.get((cell, name))
            if own is None:
                continue
            both = own.runs.keys() & reference.runs.keys()
            if seeds := tuple(seed for seed in design.seeds if seed in both):
                yield Compared(cell, name, own, reference, seeds)
