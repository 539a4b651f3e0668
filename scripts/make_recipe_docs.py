"""Write docs/recipe.md: every option of a recipe, from the table that the program itself reads.

python scripts/make_recipe_docs.py writes the page; with --check it writes nothing and exits 1
where the page is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, get_type_hints

from orchard.recipe.options import Recipe
from orchard.recipe.reading import format_value, known_options

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"

_INTRODUCTION = """\
# Every option of a recipe

<!-- Written by scripts/make_recipe_docs.py from src/orchard/recipe/options.py: edit that. -->

A recipe is a TOML file with scalars only. A value comes from the command line, else from the
recipe, else from the recipe that its `extends` names (a path relative to the file), else it is the
default below. `orchard show RECIPE --all` prints each value and where it came from; an unknown key,
a value of another type and a value out of range are errors before any model is loaded. Values that
are lists in spirit are written as one text with commas: `lora_targets = "q_proj,k_proj,v_proj"`.
"""


def render() -> str:
    """Return the page."""
    sections: dict[str, list[str]] = {}
    for key, (kind, entry) in known_options().items():
        sections.setdefault(key.rpartition(".")[0], []).append(_row(key, kind, entry))
    titles = _titles()
    parts = [_INTRODUCTION]
    for section, rows in sections.items():
        parts.append(f"## {section or 'seed'}\n")
        if titles[section]:
            parts.append(f"{titles[section]}\n")
        header = ["| key | type | default | values | meaning |", "|---|---|---|---|---|"]
        parts.append("\n".join([*header, *rows]) + "\n")
    return "\n".join(parts)


def _titles() -> dict[str, str]:
    """Return the first line of each section's docstring; the top level has none."""
    titles = {"": ""}
    for name, kind in get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(kind):
            titles[name] = (kind.__doc__ or "").partition("\n")[0]
    return titles


def _row(key: str, kind: type, entry: dataclasses.Field[Any]) -> str:
    type_name = {str: "text", int: "whole number", float: "number", bool: "true or false"}[kind]
    default: Any = entry.default
    cells = (
        f"`{key}`",
        type_name,
        f"`{format_value(default)}`",
        _values(entry),
        entry.metadata["about"],
    )
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _values(entry: dataclasses.Field[Any]) -> str:
    """Say in words which values an option takes; nothing where every value of its type goes."""
    limits = entry.metadata
    if limits["choices"]:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    words = {"minimum": "at least", "above": "above", "maximum": "at most"}
    rules = [f"{word} {limits[name]}" for name, word in words.items() if limits[name] is not None]
    return ", ".join(rules)


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="Write docs/recipe.md from the known options.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    if not parser.parse_args().check:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(render(), encoding="utf-8")
    elif not is_fresh():
        sys.exit("docs/recipe.md is stale; run python scripts/make_recipe_docs.py")


def is_fresh() -> bool:
    """Say whether the page on disk is the one that the options give."""
    return PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render()


if __name__ == "__main__":
    main()
