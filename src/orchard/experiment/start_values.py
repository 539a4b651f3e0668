"""Which values the first round of a run starts from."""

from __future__ import annotations

from pathlib import Path

from orchard.experiment.settings import lora_settings
from orchard.models.stored.exported_parts import (
    check_adapter,
    check_part,
    read_adapter,
    read_part,
)
from orchard.models.stored.loading import load_config
from orchard.models.stored.sources import build_view
from orchard.recipe.options import Recipe
from orchard.trees import Tree


def check_start(recipe: Recipe) -> None:
    """Check that ``server.start`` is an adapter of the recipe's settings; reads no tensor.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is something else, or has other settings.
    """
    if recipe.server.start:
        check_adapter(read_part(Path(recipe.server.start)), lora_settings(recipe))


def starting_values(recipe: Recipe, fresh: Tree, *, base_digest: str) -> Tree:
    """Return what the server starts from: fresh adapters, or those of ``server.start``.

    Args:
        recipe: Every choice.
        fresh: Adapters that change nothing.
        base_digest: Of the base that they are for.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no adapter, has other settings, is damaged, or is for another base.
    """
    if not recipe.server.start:
        return fresh
    part, path = read_part(Path(recipe.server.start)), recipe.model.path
    check_part(part, base_digest, what=path)
    view = build_view(load_config(path), path)
    return {**fresh, **read_adapter(part, view, lora_settings(recipe))}
