"""Workers of a run: how many, where, and what each is told when it starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch

from orchard.engine.beside import workers_beside
from orchard.engine.team import Base, Member, Place, Team, clear_room
from orchard.engine.worker import Handle
from orchard.extras import require
from orchard.recipe.options import Recipe
from orchard.results import write_json

_ROOM, _SETTINGS = "crew", "worker.json"


@dataclass(frozen=True)
class WorkerOptions:
    """How many processes compute a run's clients, and where.

    Attributes:
        number: Of workers; with one and no cluster this process computes them itself.
        ray: Address of a Ray cluster, ``host:port`` or ``auto``; empty = this machine.
    """

    number: int = 1
    ray: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no number of workers.

        Raises:
            ValueError: It is below 1.
        """
        if self.number < 1:
            raise ValueError(
                f"--workers must be at least 1, got {self.number}; 1 computes all clients in one "
                "process"
            )

    @property
    def are_elsewhere(self) -> bool:
        """Whether clients are computed in other processes than this one."""
        return self.number > 1 or bool(self.ray)


IN_THIS_PROCESS = WorkerOptions()
"""No worker beside this process."""


def check_ray(address: str) -> None:
    """Refuse a Ray cluster that is not there, within seconds; nothing where none is named.

    Raises:
        ValueError: Ray is not installed, or the address is none.
        ConnectionError: Nobody answers there.
    """
    if address:
        require("ray", to="use a Ray cluster")
        from orchard.engine.on_ray import check_address

        check_address(address)


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is told.

    Attributes:
        folder: The run's, with its recipe, on a disk that every worker reads and writes.
        directory: From which relative paths of the recipe are meant.
        room: Where tasks are put.
        num_threads: On a CPU.
    """

    folder: str
    directory: str
    room: str
    num_threads: int

    @classmethod
    def read(cls, path: Path) -> WorkerSettings:
        """Read what ``write`` wrote."""
        return cls(**json.loads(path.read_text()))


def worker_threads(recipe: Recipe, options: WorkerOptions) -> int:
    """Return with how many CPU threads each worker computes: the recipe's, or its part of all."""
    return recipe.model.num_threads or max(torch.get_num_threads() // options.number, 1)


def threads_note(recipe: Recipe, options: WorkerOptions) -> str:
    """Say so where workers compute with another number of threads than one process would."""
    own, alone = worker_threads(recipe, options), torch.get_num_threads()
    if recipe.model.num_threads or own == alone or recipe.model.device != "cpu":
        return ""
    return (
        f"each of {options.number} workers computes with {own} of {alone} threads, so results are "
        f"those of one process with model.num_threads={own}; set it to have the same with any "
        "number of workers"
    )


@dataclass(frozen=True)
class OpenTeam:
    """Workers that have loaded the model.

    Attributes:
        team: Who computes clients.
        base: What they hold.
    """

    team: Team
    base: Base


@contextmanager
def open_team(
    recipe: Recipe, folder: Path, members: Sequence[Member], options: WorkerOptions
) -> Iterator[OpenTeam]:
    """Start workers for the run in a folder, and stop them when the context ends.

    Args:
        recipe: Every choice, which stands in the folder too.
        folder: The run's.
        members: All clients.
        options: How many workers, and where.

    Raises:
        Exception: Whatever a worker raises when it loads data and model.
    """
    folder = folder.resolve()
    room = folder / _ROOM
    room.mkdir(parents=True, exist_ok=True)
    settings = room / _SETTINGS
    told = WorkerSettings(str(folder), str(Path.cwd()), str(room), worker_threads(recipe, options))
    write_json(settings, asdict(told))
    try:
        with _places(recipe, settings, folder / "logs", options) as places:
            team = Team(places, members, room=room)
            yield OpenTeam(team, team.begin())
    finally:
        settings.unlink(missing_ok=True)
        clear_room(room)


@contextmanager
def _places(
    recipe: Recipe, settings: Path, logs: Path, options: WorkerOptions
) -> Iterator[Sequence[Place]]:
    if options.ray:
        from orchard.engine.on_ray import workers_on_ray

        with workers_on_ray(
            options.ray,
            settings,
            make=_answers,
            number=options.number,
            num_threads=worker_threads(recipe, options),
            has_gpu=recipe.model.device.startswith("cuda"),
        ) as on_ray:
            yield on_ray
        return
    command = [sys.executable, "-m", "orchard.experiment.crew_worker", str(settings)]
    with workers_beside(command, gpus_of(recipe, options), logs=logs) as beside:
        yield beside


def _answers(settings: Path) -> Handle:
    """Return what answers requests where an actor is."""
    # Found by name on the other node; here it would be a circle.
    worker = import_module("orchard.experiment.crew_worker")
    handle: Handle = worker.make_worker(settings).handle
    return handle


def gpus_of(
    recipe: Recipe, options: WorkerOptions, *, num_gpus: int | None = None
) -> list[Mapping[str, str]]:
    """Return what each worker's environment says of GPUs: one for each, in turn.

    Only where the recipe says ``cuda`` without a number, and there are several.

    Args:
        recipe: Says the device.
        options: How many workers.
        num_gpus: Of this machine; None = it is asked.
    """
    if recipe.model.device != "cuda":
        return [{} for _ in range(options.number)]
    there = torch.cuda.device_count() if num_gpus is None else num_gpus
    if there < 2:
        return [{} for _ in range(options.number)]
    return [{"CUDA_VISIBLE_DEVICES": str(number % there)} for number in range(options.number)]
