"""What makes a folder the folder of one run, and what two runs must share to be one."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

from orchard.recipe.options import Recipe
from orchard.recipe.reading import (
    format_value,
    known_options,
    option_value,
    read_recipe,
    to_toml,
)
from orchard.recipe.run_options import DeploymentOptions

RECIPE_FILE = "recipe.toml"


def check_folder(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Check that a run of ``recipe`` may be written to ``folder``.

    Raises:
        ValueError: The folder holds a run, and ``resume`` is not set or the recipe is another.
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


def folder_name(client_id: str) -> str:
    """Return a file name for any client id: letters, digits, ``_`` and ``-`` stay as they are."""
    return re.sub(r"[^A-Za-z0-9_-]", lambda match: f"%{ord(match[0]):02x}", client_id)


def recipe_digest(recipe: Recipe) -> str:
    """Return what two runs must have in common for one to continue the other."""
    recipe = replace(recipe, deployment=DeploymentOptions())
    return hashlib.sha256(to_toml(recipe).encode()).hexdigest()
