"""Arguments and options that several commands have, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchard.cli.resuming import is_run

if TYPE_CHECKING:
    from orchard.recipe.reading import Resolved

RecipeArgument = Annotated[
    Path, typer.Argument(help="TOML file, or a recipe that orchard ls names.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Override values of the recipe."),
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="The run's folder; by default runs/tiny-flex for tiny/flex.toml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]
KeysOption = Annotated[
    Path | None, typer.Option(help="Folder that orchard keys made.", show_default=False)
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Cross a network without TLS and keys.")
]


def resolve(recipe: Path, overrides: list[str] | None) -> Resolved:
    """Read a recipe, and let methods of one's own be found from the working folder."""
    from orchard.catalog import find_recipe
    from orchard.recipe.reading import read_recipe

    if is_run(recipe):
        raise ValueError(
            f"recipe must be a file, got {recipe}, the folder of a run; go on with it by "
            f"orchard resume {recipe}"
        )
    resolved = read_recipe(find_recipe(recipe), overrides or [])
    if ":" in resolved.recipe.strategy.name:
        from orchard.experiment.own_methods import import_from

        import_from(Path.cwd())
    return resolved


def default_folder(recipe: Path) -> Path:
    """Return the folder of a run that was given none."""
    return Path("runs") / "-".join(recipe.with_suffix("").parts[-2:])
