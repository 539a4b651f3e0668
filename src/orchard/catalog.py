"""What there is: methods, model families, recipes; and a recipe explained value by value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from orchard.engine.progress import make_console
from orchard.families import FAMILIES, TESTED
from orchard.recipe.describing import Scalar
from orchard.recipe.method_options import BUILT_IN, OWN_METHODS
from orchard.recipe.reading import Resolved, format_value, known_options, option_value, read_recipe

_TABLE_WIDTH = 100  # below it five columns are too narrow to read


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
    """Print methods, families and recipes, each by the name that is typed; no torch is loaded."""
    console = make_console()
    listed = dict(BUILT_IN)
    # What a package offers is imported to be described, and that takes as long as a run's start.
    for point in entry_points(group=OWN_METHODS):
        listed[point.name] = _about_own(point.name)
    is_narrow = console.width < _TABLE_WIDTH
    methods = Table(title="Methods", title_justify="left")
    methods.add_column("method", no_wrap=True)
    methods.add_column("what it is")
    if not is_narrow:
        methods.add_column("source")
    for name, (about, source) in listed.items():
        methods.add_row(name, *((about,) if is_narrow else (about, source)))
    console.print(methods)
    console.print(
        "Methods join by +, such as flex+fedadam: at most one server optimizer and one way to fit "
        "a budget, any of the others. One of your own is module:attribute.\n",
        highlight=False,
    )
    passing = [family for family, reason in FAMILIES.items() if not reason]
    console.print(
        f"[bold]Model families[/bold]: {len(passing)} of {len(FAMILIES)} pass all tests, and "
        "orchard ls families says why the others do not:",
        highlight=False,
    )
    console.print(f"  {', '.join(passing)}\n", highlight=False)
    recipes = Table(title="Recipes: orchard run NAME", title_justify="left")
    recipes.add_column("name", no_wrap=True)
    recipes.add_column("method")
    if not is_narrow:
        recipes.add_column("partition")
    for path in list_recipes():
        recipe = read_recipe(path).recipe
        cells = (recipe_name(path), recipe.strategy.name, recipe.data.partition)
        recipes.add_row(*(cells[:2] if is_narrow else cells))
    console.print(recipes)


def print_families() -> None:
    """Print which model families pass all tests, and why others do not."""
    table = Table("family", "passes", "reason", title="Model families", title_justify="left")
    for family, reason in FAMILIES.items():
        table.add_row(family, "no" if reason else "yes", reason)
    console = make_console()
    console.print(table)
    console.print(f"Tested: {TESTED}.", highlight=False)


def recipe_name(path: Path) -> str:
    """Return the name by which ``find_recipe`` finds a recipe of ``list_recipes``."""
    inside = next(path.relative_to(top) for top in recipe_folders() if path.is_relative_to(top))
    return inside.with_suffix("").as_posix()


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


@dataclass(frozen=True)
class Setting:
    """One value of a recipe, explained.

    Attributes:
        key: Its dotted key.
        value: What it is.
        default: What it would be.
        source: Where it comes from: ``default``, a file, ``command line`` or ``argument``.
        meaning: What it does.
    """

    key: str
    value: Scalar
    default: Scalar
    source: str
    meaning: str


def settings(resolved: Resolved, *, show_all: bool) -> list[Setting]:
    """Return what of a recipe differs from the defaults, or everything."""
    found: list[Setting] = []
    for key, (_, entry) in known_options().items():
        value, default = option_value(resolved.recipe, key), cast(Scalar, entry.default)
        if show_all or value != default:
            source = resolved.sources[key]
            found.append(Setting(key, value, default, source, entry.metadata["about"]))
    return found


def recipe_as_json(resolved: Resolved, *, show_all: bool) -> str:
    """Return a recipe for programs: key to value, default, source and meaning."""
    about = {
        setting.key: {
            "value": setting.value,
            "default": setting.default,
            "from": setting.source,
            "meaning": setting.meaning,
        }
        for setting in settings(resolved, show_all=show_all)
    }
    return json.dumps(about, indent=1, ensure_ascii=False)


def print_recipe(resolved: Resolved, *, show_all: bool) -> None:
    """Print what of a recipe differs from the defaults, or everything, and what it means."""
    console, shown = make_console(), settings(resolved, show_all=show_all)
    if console.width >= _TABLE_WIDTH:
        console.print(_recipe_table(shown))
    else:
        for setting in shown:
            source = _short(setting.source)
            default = "" if source == "default" else f", default {format_value(setting.default)}"
            console.print(Text(f"{setting.key} = {format_value(setting.value)}", style="bold"))
            console.print(Padding(Text(f"{source}{default}. {setting.meaning}"), (0, 0, 0, 2)))
    rest = len(known_options()) - len(shown)
    if rest:
        console.print(f"{rest} more are as by default; --all shows them", highlight=False)


def _recipe_table(shown: Sequence[Setting]) -> Table:
    table = Table("key", "value", "default", "from", "meaning")
    section = ""
    for setting in shown:
        head = setting.key.rpartition(".")[0]
        if head != section:
            table.add_section()
            section = head
        style = "dim" if setting.source == "default" else ""
        value, default = format_value(setting.value), format_value(setting.default)
        table.add_row(
            setting.key, value, default, _short(setting.source), setting.meaning, style=style
        )
    return table


def _short(source: str) -> str:
    """Return the last two parts of a file's path, enough to tell recipes apart."""
    return "/".join(Path(source).parts[-2:])
