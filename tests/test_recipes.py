from __future__ import annotations

from pathlib import Path

import pytest

from federations import QUICK, RECIPES, run_quickly
from orchard.experiment.methods import METHODS, check_strategy
from orchard.recipe.reading import read_recipe

ALL = sorted(p for p in RECIPES.rglob("*.toml") if not p.name.startswith("_"))
TINY = [path for path in ALL if path.parent.name == "tiny"]


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_recipe_resolves_to_a_method(path: Path) -> None:
    assert check_strategy(read_recipe(path).recipe.strategy.name)


@pytest.mark.parametrize("folder", ["tiny", "dolly"])
def test_every_method_has_a_recipe(folder: str) -> None:
    names = {read_recipe(path).recipe.strategy.name for path in ALL if path.parent.name == folder}
    assert METHODS.keys() <= names


@pytest.mark.parametrize(
    "path",
    [
        # tests/strategies runs every method; here the one that everything else is made of.
        pytest.param(path, marks=() if path.stem == "fedavg" else pytest.mark.long)
        for path in TINY
    ],
    ids=name_of,
)
def test_tiny_recipe_runs(path: Path, tmp_path: Path) -> None:
    overrides = [*QUICK, "server.rounds=1", "evaluation.models=personal", "evaluation.metrics=loss"]
    if path.stem == "finetune":
        overrides += ["server.rounds=2", "strategy.finetune_rounds=1"]
    result = run_quickly(tmp_path, read_recipe(path, overrides).recipe)
    assert 0 < result["summary"]["personal"]["loss"]["mean"] < 10


def test_methods_are_compared_on_the_same_budget() -> None:
    """The demo's three recipes differ in the method alone."""
    recipes = [
        read_recipe(RECIPES / "tiny" / f"{m}.toml").recipe for m in ("local", "fedavg", "flex")
    ]
    assert len({(r.model, r.data, r.client, r.server, r.evaluation, r.seed) for r in recipes}) == 1
