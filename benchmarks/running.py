"""What scripts of benchmarks share: a recipe run by the command line, and their arguments."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_recipe(recipe: str, overrides: Sequence[str], *, out: Path) -> None:
    """Run a recipe on one thread by the command line, or go on with what is in ``out``.

    Args:
        recipe: Below ``recipes/``, without ending.
        overrides: Settings that differ.
        out: The run's folder; what the run prints goes to a file beside it.

    Raises:
        CalledProcessError: The run failed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-c", "from orchard.cli import main; main()", "run"),
        *(f"recipes/{recipe}.toml", *overrides),
        *("--out", str(out), "--resume"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with out.with_name(f"{out.name}.log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)


def arguments_of(
    description: str | None, *, only: Sequence[str] = (), seeds: Sequence[int] = ()
) -> argparse.ArgumentParser:
    """Return the arguments that scripts have in common.

    Args:
        description: The script's docstring, whose first line is shown.
        only: What can be chosen of; empty = there is no choice.
        seeds: Those of a whole benchmark; empty = it has none.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--model", help="base, as model.path")
    parser.add_argument("--data", help="examples, as data.path")
    parser.add_argument("--table", action="store_true", help="only write the page")
    if only:
        parser.add_argument("--only", nargs="*", default=list(only), choices=list(only))
    if seeds:
        parser.add_argument("--seeds", nargs="*", type=int, default=list(seeds))
    return parser
