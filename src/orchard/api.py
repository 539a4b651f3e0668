"""The Python way in: what the command does, as functions that return typed values.

``load_recipe``, ``plan``, ``run`` and ``load`` are what ``import orchard`` offers, and what the
command calls. Torch is imported inside them, never before.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from orchard.runs import Result, Run

if TYPE_CHECKING:
    from orchard.engine.progress import Reporter
    from orchard.experiment.own_methods import Transform
    from orchard.experiment.planning import Plan
    from orchard.experiment.preparation import Experiment
    from orchard.experiment.workers import WorkerOptions
    from orchard.personal.opening import OpenedModel
    from orchard.recipe.describing import Scalar
    from orchard.recipe.options import Recipe
    from orchard.strategies.strategy import Strategy
    from orchard.tracking.trackers import Tracker


def load_recipe(
    path: str | Path,
    /,
    **changes: Scalar | os.PathLike[str] | Mapping[str, Scalar | os.PathLike[str]],
) -> Recipe:
    """Read and check a recipe.

    Args:
        path: TOML file, or the name of a packaged recipe, such as ``tiny/flex``.
        changes: Values that win over the file's: ``seed=1``; a section is a mapping,
            ``server={"rounds": 3}``; a dotted key goes by ``**{"server.rounds": 3}``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no recipe, or a key or value is wrong, or a change has no effect.
    """
    from orchard.catalog import find_recipe
    from orchard.recipe.reading import read_recipe

    return read_recipe(find_recipe(Path(path)), changes=changes).recipe


@overload
def load(folder: str | Path) -> Run: ...


@overload
def load(
    folder: str | Path,
    *,
    client: str,
    model: None = None,
    round_number: int | Literal["best"] | None = None,
    device: str | None = None,
) -> OpenedModel: ...


@overload
def load(
    folder: str | Path,
    *,
    client: str | None = None,
    model: Literal["base", "global", "personal"],
    round_number: int | Literal["best"] | None = None,
    device: str | None = None,
) -> OpenedModel: ...


def load(
    folder: str | Path,
    *,
    client: str | None = None,
    model: Literal["base", "global", "personal"] | None = None,
    round_number: int | Literal["best"] | None = None,
    device: str | None = None,
) -> Run | OpenedModel:
    """Read a run's folder, or open one of its models, without any client's data.

    Args:
        folder: The run's, or a site's store.
        client: Open the personal model of this client; its ``generate`` answers a prompt, and
            ``model`` and ``tokenizer`` are those of transformers.
        model: Open ``global``, ``base`` or ``personal``; with neither this nor ``client`` the run
            is read, finished or not, and no model is opened.
        round_number: The model after this round, or ``best``; None = the last.
        device: Where the model runs; None = as the recipe says.

    Raises:
        FileNotFoundError: No run was started there, or its base is not there.
        ValueError: Its files do not parse, there is no such model, or the base is another.
    """
    from orchard import runs

    if client is None and model is None:
        if round_number is not None or device is not None:
            raise ValueError(
                "client or model must be given with round_number or device, got neither; for "
                'example model="global"'
            )
        return runs.load(folder)
    from orchard.personal.choosing import choose_state
    from orchard.personal.opening import open_model

    state = choose_state(Path(folder), client=client, model=model, round_number=round_number)
    return open_model(state, device=device)


def plan(recipe: Recipe) -> Plan:
    """Compute what a recipe asks of each client, before any weight is loaded.

    Raises:
        FileNotFoundError: Data or model are not there.
        ValueError: Something does not fit.
    """
    from orchard.experiment.planning import make_plan

    return make_plan(recipe)


def run(
    recipe: Recipe,
    *,
    out: str | Path,
    resume: bool = False,
    progress: bool | Reporter = True,
    strategy: Strategy | Transform | None = None,
    track: str | Sequence[str] = (),
    workers: int = 1,
    ray: str = "",
) -> Result:
    """Run a recipe, or go on running it, and return what it found.

    What a person should know about the data before trusting the result is a warning, and so is a
    tracker that fails.

    Args:
        recipe: Every choice, from ``load_recipe``.
        out: The run's folder, which holds no run yet.
        resume: Continue the run in ``out`` where there is one.
        progress: Show a bar in a terminal and a line per round elsewhere; False shows nothing, and
            a reporter of your own is told of everything that takes time.
        strategy: A method of your own: a function from a strategy to a strategy, which joins the
            recipe's methods, or a ``Strategy`` in the place of them.
        track: Trackers that get the metrics: ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``.
        workers: Processes that compute the clients, each with a model of its own; results are those
            of one.
        ray: Address of a Ray cluster that they run on, ``host:port`` or ``auto``; empty = this
            machine.

    Raises:
        FileNotFoundError: Data or model are not there.
        ValueError: Something does not fit, or ``out`` holds another run, or a tracker's library is
            not installed.
        Exception: Whatever a client raises, with a note of round, client and stage.
    """
    prepared = prepare(
        recipe,
        out=out,
        resume=resume,
        strategy=strategy,
        track=track,
        workers=workers,
        ray=ray,
    )
    for note in prepared.notes:
        warnings.warn(note, stacklevel=2)
    return execute(prepared, progress=progress)


@dataclass(frozen=True)
class Prepared:
    """A run that can begin: everything that can be checked without its weights is checked.

    Attributes:
        experiment: The recipe with its data.
        folder: The run's folder.
        notes: What a person should know about the data before trusting the result.
        trackers: That will get the metrics, by name.
        strategy: A method that was passed as an object.
        workers: Who computes the clients.
        resume: Whether a run that is there may be continued.
    """

    experiment: Experiment
    folder: Path
    notes: tuple[str, ...]
    trackers: Mapping[str, Tracker]
    strategy: Strategy | Transform | None = None
    workers: WorkerOptions | None = None
    resume: bool = False


def prepare(
    recipe: Recipe,
    *,
    out: str | Path,
    resume: bool = False,
    strategy: Strategy | Transform | None = None,
    track: str | Sequence[str] = (),
    workers: int = 1,
    ray: str = "",
) -> Prepared:
    """Check what ``run`` will do, and read its data.

    Args:
        recipe: Every choice.
        out: The run's folder, which holds no run yet.
        resume: Continue the run in ``out`` where there is one.
        strategy: See ``run``.
        track: Names of trackers.
        workers: See ``run``.
        ray: See ``run``.

    Raises:
        FileNotFoundError: Data or model are not there.
        ValueError: Something does not fit, or ``out`` holds another run, or a tracker's library is
            not installed.
    """
    from orchard.experiment.workers import WorkerOptions, check_ray
    from orchard.tracking.trackers import make_trackers

    options = WorkerOptions(workers, ray)
    check_ray(ray)
    trackers = make_trackers([track] if isinstance(track, str) else track)
    from orchard.experiment.preparation import data_notes, prepare_experiment
    from orchard.experiment.room import check_gpu, check_workers
    from orchard.experiment.run_folder import check_folder, check_unused
    from orchard.experiment.running import check_passed, check_run

    check_passed(options, strategy)
    folder = Path(out)
    check_unused(folder)
    check_folder(folder, recipe, resume=resume, passed=strategy)
    experiment = prepare_experiment(recipe)
    try:
        check_run(folder, experiment, resume=resume, passed=strategy)
    except ValueError:
        check_unused(folder)  # who began a run there meanwhile is the reason
        raise
    check_workers(recipe, options)
    check_gpu(recipe)
    notes = tuple(data_notes(experiment))
    return Prepared(experiment, folder, notes, trackers, strategy, options, resume)


def execute(
    prepared: Prepared,
    *,
    progress: bool | Reporter = True,
    warn: Callable[[str], None] = warnings.warn,
) -> Result:
    """Run what ``prepare`` has checked, and return what it found.

    Args:
        prepared: Recipe, data, folder and method.
        progress: See ``run``.
        warn: Told why a tracker stopped, if one does, and of what is slow with this model.

    Raises:
        Exception: Whatever a client raises, with a note of round, client and stage.
    """
    from orchard.experiment.run_folder import recorded_as
    from orchard.experiment.running import run_experiment
    from orchard.experiment.starting import Start
    from orchard.experiment.workers import WorkerOptions
    from orchard.tracking.following import Following

    experiment, folder, reporter = prepared.experiment, prepared.folder, _reporter(progress)
    if prepared.trackers:
        recipe = recorded_as(experiment.recipe, prepared.strategy).recipe
        reporter = Following(reporter, prepared.trackers, folder=folder, recipe=recipe, warn=warn)
    workers = prepared.workers or WorkerOptions()
    start = Start(
        directory=str(Path.cwd()),
        track=tuple(prepared.trackers),
        workers=workers.number,
        ray=workers.ray,
    )
    record = run_experiment(
        experiment,
        folder=folder,
        reporter=reporter,
        strategy=prepared.strategy,
        warn=warn,
        workers=workers,
        start=start,
        resume=prepared.resume,
    )
    return Result(folder, record)


def _reporter(progress: bool | Reporter) -> Reporter:
    from orchard.engine.progress import Silent, choose_reporter, make_console

    if isinstance(progress, bool):
        return choose_reporter(make_console()) if progress else Silent()
    return progress
