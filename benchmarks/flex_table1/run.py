"""Run every method on FLEx's four-client Dolly setting and write the page.

    python -m benchmarks.flex_table1.run --model MODEL --data DOLLY.jsonl [--only flex fedavg]
    python -m benchmarks.flex_table1.run --table

Each run goes to runs/flex_table1/<recipe> (a finished or interrupted one is continued); its
result.json is kept in results/ here, and page and table.md are written from those alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.flex_table1.report import HERE, RECIPES, page
from benchmarks.records import keep
from benchmarks.running import arguments_of, run_recipe


def run(recipe: str, *, model: str, data: str) -> None:
    """Run one recipe and keep its result."""
    out = Path("runs") / "flex_table1" / recipe
    # The base is the same for all: it is evaluated once, with the first recipe.
    models = [] if recipe == RECIPES[0] else ["evaluation.models=global,local,personal"]
    run_recipe(f"dolly/{recipe}", [f"model.path={model}", f"data.path={data}", *models], out=out)
    keep(HERE / "results" / f"{recipe}.json", json.loads((out / "result.json").read_text()))


def main() -> None:
    """Run what was asked for, then write the page."""
    given = arguments_of(__doc__, only=RECIPES).parse_args()
    for recipe in () if given.table else given.only:
        run(recipe, model=given.model, data=given.data)
    page().write()


if __name__ == "__main__":
    main()
