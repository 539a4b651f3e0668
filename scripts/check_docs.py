"""Check that the documentation tells the truth about the code.

Every relative link and heading exists; every method has a card of the one form, with the options'
defaults, and every card a method; docs/recipe.md has every option; every recipe parses; every
``orchard`` command that is shown would be accepted; every file and test that is named exists; the
layers are those of the import contract. Prints what is wrong, and exits 1 where something is.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_privacy_docs
import make_recipe_docs
import typer

from orchard.catalog import find_recipe
from orchard.cli import app
from orchard.experiment.methods import METHODS
from orchard.recipe.reading import format_value, known_options, read_recipe

ROOT = Path(__file__).parent.parent
CARD_HEADINGS = (
    "Paper",
    "In one paragraph",
    "What a client trains, keeps and sends",
    "Recipe options",
    "What differs from the paper or its code",
    "What is a guess",
    "What it was checked against",
)
WITH_RECIPE = ("run", "show", "partition", "preview", "plan")

_FENCE = re.compile(r"^(```+|~~~+)[ ]*(\S*)[^\n]*\n(.*?)^\1[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
_TEST = re.compile(r"(tests/[\w/]+\.py)(?:::(test_\w+))?")
_SOURCE = re.compile(r"`((?:src|recipes|examples|scripts|benchmarks)/[\w./-]+)`")
_DEFINED = re.compile(r"`(src/[\w/]+\.py)::(?:\w+\.)?(\w+)`")


def pages() -> list[Path]:
    """Return the pages that are checked; README.md and CONTRIBUTING.md where they exist."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [page for page in top if page.is_file()] + sorted((ROOT / "docs").rglob("*.md"))


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the content of each fenced block."""
    for match in _FENCE.finditer(text):
        yield match[2], match[3]


def anchor(heading: str) -> str:
    """Return the fragment under which a heading can be linked."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Return the fragments of a page."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(heading) for heading in _HEADING.findall(prose)}


def check_links(page: Path, text: str) -> Iterator[str]:
    """Yield every relative link that leads nowhere."""
    for target in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists():
            yield f"links to {target}, which does not exist"
        elif not linked.is_relative_to(ROOT.resolve()):
            yield f"links to {target}, which is outside the project"
        elif fragment and linked.suffix == ".md" and fragment not in anchors(linked):
            yield f"links to {target}, but there is no such heading"


def check_names(text: str) -> Iterator[str]:
    """Yield every file, test and function that is named but does not exist.

    NAME stands for any name; ``src/orchard/trees.py::clone`` and ``FILE.py::Class.method`` are
    functions.
    """
    for path, test in sorted(set(_TEST.findall(text))):
        file = ROOT / path
        if not file.is_file():
            yield f"names {path}, which does not exist"
        elif test and not re.search(rf"def {test}\b", file.read_text(encoding="utf-8")):
            yield f"names {path}::{test}, which does not exist"
    for path in sorted(set(_SOURCE.findall(text))):
        if not Path(path).stem.isupper() and not (ROOT / path).exists():
            yield f"names {path}, which does not exist"
    for path, name in sorted(set(_DEFINED.findall(text))):
        file = ROOT / path
        code = file.read_text(encoding="utf-8") if file.is_file() else ""
        if not re.search(rf"^\s*(?:(?:def|class) {name}\b|{name}: )", code, re.MULTILINE):
            yield f"names {path}::{name}, which does not exist"


def commands(text: str) -> Iterator[str]:
    """Yield the ``orchard`` commands in code blocks and in code spans."""
    for _, content in blocks(text):
        for line in re.sub(r"\\\n\s*", " ", content).splitlines():
            command = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if command.startswith("orchard "):
                yield command
    for span in re.findall(r"`(orchard [^`]+)`", _FENCE.sub("", text)):
        yield " ".join(span.split())


def stands_for_anything(word: str) -> bool:
    """Say whether a word of a command is a reader's own: in capitals, or a shell variable."""
    return word.isupper() or "$" in word


def check_command(command: str, recipes: Path) -> Iterator[str]:
    """Yield what is wrong with one command; see ``stands_for_anything``.

    Args:
        command: As a reader would type it.
        recipes: Folder with the recipes that the page itself shows.
    """
    words = shlex.split(command, comments=True)
    name, *arguments = words[1:]
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if name.startswith("-"):
        return
    if name not in known:
        yield f"shows {command!r}, but there is no such command"
        return
    options = {o: p for p in known[name].params for o in p.opts if o.startswith("-")}
    values: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if not word.startswith("-"):
            values.append(word)
        elif word == "--help":
            continue
        elif word.partition("=")[0] not in options:
            yield f"shows {command!r}, but {name} has no option {word}"
        elif "=" not in word and not getattr(options[word], "is_flag", False):
            next(rest, None)
    if name in WITH_RECIPE:
        if not values:
            yield f"shows {command!r}, which lacks a recipe"
        elif not stands_for_anything(values[0]):
            own = recipes / values[0]
            found = own if own.is_file() else find_recipe(Path(values[0]))
            overrides = [value for value in values[1:] if not stands_for_anything(value)]
            try:
                read_recipe(found, overrides)
            except (ValueError, OSError) as error:
                yield f"shows {command!r}, but: {error}"


def check_commands(text: str) -> Iterator[str]:
    """Yield what is wrong with the commands of a page, and with the recipes that it shows.

    A block of TOML that begins with a comment such as ``# mine.toml`` is that recipe.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipes").symlink_to(ROOT / "recipes")
        for language, content in blocks(text):
            title = re.match(r"#\s*([\w.-]+\.toml)\s*\n", content)
            if language != "toml" or title is None:
                continue
            (folder / title[1]).write_text(content, encoding="utf-8")
            try:
                read_recipe(folder / title[1])
            except (ValueError, OSError) as error:
                yield f"shows {title[1]}, but: {error}"
        for command in commands(text):
            yield from check_command(command, folder)


def check_cards() -> Iterator[str]:
    """Yield methods without a card, cards without a method, and cards of another form."""
    cards = {path.stem: path for path in (ROOT / "docs" / "methods").glob("*.md")}
    for name in sorted(METHODS.keys() - cards.keys()):
        yield f"docs/methods/{name}.md: method {name} must have a card, got none"
    for name in sorted(cards.keys() - METHODS.keys()):
        yield f"docs/methods/{name}.md: a card must have its method, got no method {name}"
    for name, path in sorted(cards.items()):
        headings = tuple(re.findall(r"^## (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
        if headings != CARD_HEADINGS:
            yield f"docs/methods/{name}.md: headings must be {CARD_HEADINGS}, got {headings}"
        yield from (f"docs/methods/{name}.md {found}" for found in check_defaults(path))


def check_defaults(card: Path) -> Iterator[str]:
    """Yield the options of a card's table that are unknown or have another default."""
    known = known_options()
    table = card.read_text(encoding="utf-8").partition("## Recipe options")[2].partition("\n## ")[0]
    for key, shown in re.findall(r"^\| `([\w.]+)` \|([^|]*)\|", table, re.MULTILINE):
        if key not in known:
            yield f"names the option {key}, which does not exist"
            continue
        default: Any = known[key][1].default
        if shown.strip() not in ("", f"`{format_value(default)}`"):
            yield f"gives {key} the default {shown.strip()}, it is {format_value(default)}"


def check_layers() -> Iterator[str]:
    """Yield layers of an import contract that docs/architecture.md does not show as they are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    page = ROOT / "docs" / "architecture.md"
    shown = [content.split("\n")[:-1] for _, content in blocks(page.read_text("utf-8"))]
    for contract in contracts:
        if contract["type"] == "layers" and contract["layers"] not in shown:
            layers = "; ".join(contract["layers"])
            yield f"docs/architecture.md must show the layers of pyproject.toml: {layers}"


def check_recipes() -> Iterator[str]:
    """Yield every recipe that does not parse."""
    for path in sorted((ROOT / "recipes").rglob("*.toml")):
        try:
            read_recipe(path)
        except (ValueError, OSError) as error:
            yield f"{path.relative_to(ROOT)}: {error}"


def problems() -> Iterator[str]:
    """Yield everything that is wrong."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for found in (*check_links(page, text), *check_names(text), *check_commands(text)):
            yield f"{page.relative_to(ROOT)} {found}"
    yield from check_cards()
    yield from check_layers()
    yield from check_recipes()
    if not make_recipe_docs.is_fresh():
        yield "docs/recipe.md is stale; run python scripts/make_recipe_docs.py"
    if not make_privacy_docs.is_fresh():
        yield "docs/privacy.md is stale; run python scripts/make_privacy_docs.py"


def main() -> None:
    """Print the problems, one a line."""
    found = list(problems())
    for problem in found:
        print(problem)
    if found:
        sys.exit(f"{len(found)} problems in the documentation")
    print(f"{len(pages())} pages agree with the code")


if __name__ == "__main__":
    main()
