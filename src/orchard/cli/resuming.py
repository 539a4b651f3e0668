"""What a run's folder says of how to go on with it, and what is said when it stops."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchard.experiment.starting import Start

_RECIPE_FILE = "recipe.toml"  # of a run's folder; experiment/run_folder.py imports torch


def is_run(path: Path) -> bool:
    """Say whether a path is the folder of a run."""
    return (path / _RECIPE_FILE).is_file()


def recipe_of(folder: Path) -> Path:
    """Return the recipe of the run in a folder, with all its values.

    Raises:
        FileNotFoundError: There is no run.
    """
    if not is_run(folder):
        raise FileNotFoundError(
            f"run must be a folder with a {_RECIPE_FILE}, got {folder}; name the folder that "
            "orchard run was given as --out"
        )
    return folder / _RECIPE_FILE


def back_to_start(folder: Path) -> Start:
    """Make the working folder that in which a run was started, and return how it was.

    Raises:
        ValueError: What is written down of it does not parse.
    """
    from orchard.experiment.starting import Start, read_start

    here = Start(directory=str(Path.cwd()))
    start = read_start(folder) or here
    if Path(start.directory).is_dir():
        os.chdir(start.directory)
    else:
        print(
            f"note: the run was started in {start.directory}, which is not here; relative paths "
            f"are meant from {here.directory}",
            file=sys.stderr,
        )
    return start


def where_it_stopped(folder: Path, num_rounds: int) -> str:
    """Say after which round the run in a folder stopped, and how to go on."""
    from orchard.server.checkpoint import newest_round

    if not is_run(folder):
        return "stopped before the run began; nothing was written"
    done = newest_round(folder / "checkpoints")
    after = f"after round {done} of {num_rounds}" if done else "before its first round was complete"
    return f"stopped {after}; go on with: orchard resume {shlex.quote(str(folder))}"
