"""Which values the first round of a run starts from."""

from __future__ import annotations

from pathlib import Path

from orchard.experiment.settings import lora_settings
from orchard.models.stored.exported_parts import check_adapter, check_part, read_part, values_in
from orchard.models.trainable.adapters import AdaptedModel
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


def starting_values(recipe: Recipe, model: AdaptedModel) -> Tree:
    """Return what the server starts from: fresh adapters, or those of ``server.start``.

    What the adapter of ``server.start`` has no value for is fresh.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no adapter, has other settings, is damaged, or is for another base.
    """
    if not recipe.server.start:
        return model.fresh
    part = read_part(Path(recipe.server.start))
    check_adapter(part, lora_settings(recipe))
    check_part(part, model.base_digest, what=recipe.model.path)
    return {**model.fresh, **values_in(part, model.model, model.slots)}
