"""Whole folders that ``orchard export`` wrote, opened by what they say of themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from orchard.models.stored.grafted import brings_code, check_modeling, load_grafted
from orchard.models.stored.loading import Base, load_base
from orchard.recipe.options import Recipe
from orchard.recipe.reading import parse_recipe

EXPORTED = "orchard.json"  # of a folder that orchard export wrote


@dataclass(frozen=True)
class Exported:
    """A whole folder.

    Attributes:
        folder: Where it is.
        recipe: Of the run that it came from, its base as it was there.
        base_digest: Of that base.
        has_code: Whether its grafts need the modeling file beside them.
    """

    folder: Path
    recipe: Recipe
    base_digest: str
    has_code: bool

    @property
    def own_recipe(self) -> Recipe:
        """The recipe with the folder in the base's place."""
        return replace(self.recipe, model=replace(self.recipe.model, path=str(self.folder)))

    def load(self, *, device: str | None = None) -> Base:
        """Load its model, frozen.

        Args:
            device: Where it runs; None = as the recipe says.

        Raises:
            ValueError: A tensor is missing or is no number.
        """
        dtype, device = self.recipe.model.dtype, device or self.recipe.model.device
        if self.has_code:
            return load_grafted(self.folder, dtype=dtype, device=device)
        return load_base(str(self.folder), dtype=dtype, device=device)


def is_exported(folder: Path) -> bool:
    """Say whether a folder is a whole model that was exported."""
    return (folder / EXPORTED).is_file() and (folder / "config.json").is_file()


def read_exported(folder: Path) -> Exported:
    """Read what an exported folder says of itself.

    Raises:
        ValueError: It does not parse, or the folder brings other code than this version writes,
            which is not run.
    """
    path = folder / EXPORTED
    try:
        about = json.loads(path.read_bytes())
        recipe = parse_recipe(about["recipe"])
        digest = str(about["base_digest"])
        has_code = brings_code(json.loads((folder / "config.json").read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be as orchard export wrote it, got what does not parse; export anew"
        ) from error
    if has_code:
        check_modeling(folder)
    return Exported(folder, recipe, digest, has_code)
