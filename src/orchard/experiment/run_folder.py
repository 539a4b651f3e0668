"""What makes a folder the folder of one run, and what two runs must share to be one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from orchard.experiment.methods import own_names
from orchard.experiment.own_methods import own_digests
from orchard.recipe.options import Recipe
from orchard.recipe.reading import (
    format_value,
    known_options,
    option_value,
    read_recipe,
    to_toml,
)
from orchard.recipe.run_options import DeploymentOptions
from orchard.results import write_atomically, write_json

RECIPE_FILE, METHODS_FILE = "recipe.toml", "methods.json"


def begin_folder(folder: Path, recipe: Recipe, *, digests: Mapping[str, str]) -> None:
    """Make a folder the folder of a run of ``recipe``.

    Args:
        folder: Of the run.
        recipe: Every choice.
        digests: Own methods to the digests of their sources; see ``experiment/own_methods.py``.
    """
    if digests:
        write_json(folder / METHODS_FILE, dict(digests))
    write_atomically(folder / RECIPE_FILE, to_toml(recipe).encode())


def check_folder(
    folder: Path, recipe: Recipe, *, resume: bool, digests: Mapping[str, str] | None = None
) -> None:
    """Check that a run of ``recipe`` may be written to ``folder``.

    Args:
        folder: Of the run.
        recipe: Every choice.
        resume: Whether a run that is there may be continued.
        digests: Own methods to the digests of their sources; None = those of the recipe.

    Raises:
        ValueError: The folder holds a run, and ``resume`` is not set, or the recipe or a method is
            another.
    """
    if not (folder / RECIPE_FILE).exists():
        return
    if not resume:
        raise ValueError(
            f"--out must be a new folder, got {folder}, which holds a run; "
            "add --resume to continue it, or choose another"
        )
    before = read_recipe(folder / RECIPE_FILE).recipe
    for key in known_options():
        if key.startswith("deployment."):  # how long to wait may change between two starts
            continue
        old, new = option_value(before, key), option_value(recipe, key)
        if old != new:
            raise ValueError(
                f"{key} must be {format_value(old)} to resume the run in {folder}, got "
                f"{format_value(new)}; use the same recipe, or another --out"
            )
    path = folder / METHODS_FILE
    if digests is None:
        digests = own_digests(own_names(recipe.strategy.name))
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    for name in [*known, *digests]:
        if known.get(name) != digests.get(name):
            raise ValueError(
                f"the source of {name} must have SHA-256 {known.get(name)} to resume the run in "
                f"{folder}, got {digests.get(name)}; bring back the file as it was, or use another "
                "--out"
            )


def folder_name(client_id: str) -> str:
    """Return a file name for any client id: letters, digits, ``_`` and ``-`` stay as they are."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda match: f"%{ord(match[0]):02x}", client_id)


def recipe_digest(recipe: Recipe) -> str:
    """Return what two runs must have in common for one to continue the other."""
    recipe = replace(recipe, deployment=DeploymentOptions())
    return hashlib.sha256(to_toml(recipe).encode()).hexdigest()
