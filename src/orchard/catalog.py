"""What there is: methods, model families, recipes; and a recipe explained value by value."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from orchard.engine.progress import make_console
from orchard.recipe.reading import (
    Resolved,
    format_value,
    known_options,
    option_value,
    read_recipe,
)

# Detection goes by interface, so this is what the parity tests cover, not what is allowed.
FAMILIES = (
    "Qwen2-MoE",
    "Qwen3-MoE",
    "Qwen3-Next",
    "OLMoE",
    "Mixtral",
    "Phi-MoE",
    "DeepSeek-V2",
    "DeepSeek-V3",
    "Granite-MoE",
    "GPT-OSS",
    "Aria",
    "Nemotron-H",
    "AFMoE",
    "DeepSeek-MoE-16B (listed experts; view only, as loading runs no code of a checkpoint)",
    "Switch Transformers (view only)",
)


def recipe_folders() -> list[Path]:
    """Return where recipes are looked for: here, then in the package or its checkout."""
    package = Path(__file__).parent
    candidates = [Path("recipes"), package / "recipes", package.parent.parent / "recipes"]
    return [folder for folder in candidates if folder.is_dir()]


def find_recipe(path: Path) -> Path:
    """Return the recipe file that ``path`` means.

    A path that exists is itself; ``recipes/tiny/flex.toml`` and ``tiny/flex`` also find the recipe
    that ships with the package. What is not found is returned as it is, for the reader to refuse.
    """
    if path.exists():
        return path
    parts = path.parts[1:] if path.parts and path.parts[0] == "recipes" else path.parts
    for folder in recipe_folders():
        found = folder.joinpath(*parts).with_suffix(".toml")
        if found.is_file():
            return found
    return path


def list_recipes() -> list[Path]:
    """Return the recipes of the first folder that has any; names that begin with _ are bases."""
    for folder in recipe_folders():
        found = sorted(p for p in folder.rglob("*.toml") if not p.name.startswith("_"))
        if found:
            return found
    return []


def print_catalog() -> None:
    """Print methods, families and recipes."""
    from orchard.experiment.methods import METHODS
    from orchard.experiment.own_methods import offered

    console = make_console()
    methods = Table("method", "what it is", "source", title="Methods", title_justify="left")
    for name, method in METHODS.items():
        methods.add_row(name, method.about, method.source)
    for name in offered():
        methods.add_row(name, *_about_own(name))
    console.print(methods)
    console.print(
        "Methods join by +, such as flex+fedadam: at most one server optimizer and one way to fit "
        "a budget, any of the others. One of your own is module:attribute.\n",
        highlight=False,
    )
    console.print("[bold]Model families[/bold] that the parity tests cover:", highlight=False)
    console.print(f"  {', '.join(FAMILIES)}\n", highlight=False)
    recipes = Table("recipe", "method", "partition", title="Recipes", title_justify="left")
    for path in list_recipes():
        recipe = read_recipe(path).recipe
        recipes.add_row(str(path), recipe.strategy.name, recipe.data.partition)
    console.print(recipes)


def _about_own(name: str) -> tuple[str, str]:
    """Return what an installed package says of its method, or why it cannot be used."""
    from orchard.experiment.methods import METHODS
    from orchard.experiment.own_methods import find_own

    try:
        if name in METHODS:
            raise ValueError(f"{name} comes with Orchard")
        method = find_own(name)
    except ValueError as error:
        return f"cannot be used: {error}", ""
    return method.about, method.source


def print_recipe(resolved: Resolved) -> None:
    """Print every value of a recipe, where it comes from, and what it means."""
    table = Table("key", "value", "from", "meaning")
    section = ""
    for key, (_, entry) in known_options().items():
        head = key.rpartition(".")[0]
        if head != section:
            table.add_section()
            section = head
        value = option_value(resolved.recipe, key)
        source = resolved.sources[key]
        style = "dim" if source == "default" else ""
        table.add_row(key, format_value(value), source, entry.metadata["about"], style=style)
    make_console().print(table)
