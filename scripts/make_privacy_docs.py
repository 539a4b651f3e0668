"""Write the table of docs/privacy.md: every method under every protection, asked of the checks.

python scripts/make_privacy_docs.py writes the table; with --check it writes nothing and exits 1
where the table is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from orchard.experiment.methods import METHODS
from orchard.experiment.protecting import check_privacy
from orchard.experiment.secrecy import check_secrecy
from orchard.recipe.reading import read_recipe

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "privacy.md"
_BLOCK = re.compile(
    r"(?<=<!-- Written by scripts/make_privacy_docs.py -->\n).*?(?=<!-- end of methods -->)",
    re.DOTALL,
)
_UNIT = ("privacy.epsilon=8", "privacy.delta=1e-3", "server.weighting=uniform")
PROTECTIONS = {
    "client": ("privacy.unit=client", *_UNIT),
    "example": ("privacy.unit=example", *_UNIT),
    "secure_aggregation": ("privacy.secure_aggregation=true",),
}
"""What a recipe must say for each protection."""
_CURED = {
    "strategy.graft_choice": "random",
    "strategy.judged_below": "0",
    "selection.router": "examples",
}
# Of a federation of four equal clients.
_SIZES = {f"client-{number}": 160 for number in range(4)}


def verdict(method: str, protection: str) -> str:
    """Return ``yes``, ``with KEY=VALUE``, or ``refused: `` and why."""
    cures: list[str] = []
    while True:
        overrides = [*PROTECTIONS[protection], *cures]
        recipe = read_recipe(ROOT / "recipes" / "tiny" / f"{method}.toml", overrides).recipe
        try:
            check_privacy(recipe, _SIZES)
            check_secrecy(recipe, _SIZES)
        except ValueError as error:
            key = str(error).partition(" must ")[0]
            if key not in _CURED or f"{key}={_CURED[key]}" in cures:
                return f"refused: {str(error).rpartition('; ')[2]}"
            cures.append(f"{key}={_CURED[key]}")
            continue
        return f"with {', '.join(f'`{cure}`' for cure in cures)}" if cures else "yes"


def render() -> str:
    """Return the table; methods with the same answers share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for method in METHODS:
        answers = tuple(verdict(method, protection) for protection in PROTECTIONS)
        rows.setdefault(answers, []).append(f"`{method}`")
    header = "| method | `client` | `example` | `secure_aggregation` |\n|---|---|---|---|\n"
    lines = (f"| {', '.join(names)} | {' | '.join(own)} |\n" for own, names in rows.items())
    return header + "".join(lines)


def written() -> str:
    """Return the page with the table as it must be."""
    return _BLOCK.sub(lambda _: render(), PAGE.read_text(encoding="utf-8"), count=1)


def is_fresh() -> bool:
    """Say whether the page has the table."""
    return PAGE.read_text(encoding="utf-8") == written()


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if not is_fresh():
            sys.exit("docs/privacy.md is stale; run python scripts/make_privacy_docs.py")
        return
    PAGE.write_text(written(), encoding="utf-8")


if __name__ == "__main__":
    main()
