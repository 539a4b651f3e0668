"""On real text, where it is at hand: beside the checkout, in shared/."""

from __future__ import annotations

from pathlib import Path

import pytest

from federations import RECIPES, run_quickly
from orchard.recipe.reading import read_recipe

SHARED = Path(__file__).parent.parent.parent / "shared"
MODEL, DOLLY = (
    SHARED / "models" / "base-9m",
    SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl",
)

pytestmark = pytest.mark.skipif(
    not (MODEL.is_dir() and DOLLY.is_file()),
    reason="needs a real model and Dolly in ../shared, which are not part of the project",
)


@pytest.mark.parametrize("name", ["flex", "dirichlet_flex_majority"])
def test_flex_on_dolly_beats_its_base_after_two_rounds(name: str, tmp_path: Path) -> None:
    overrides = [
        f"model.path={MODEL}",
        f"data.path={DOLLY}",
        "server.rounds=2",
        "data.max_tokens=256",
        "evaluation.metrics=loss",
        "evaluation.max_examples=20",
        "strategy.calibration_blocks=2",
    ]
    if "dirichlet" in name:
        overrides += ["data.num_clients=2", "data.examples_per_client=60"]
    result = run_quickly(
        tmp_path, read_recipe(RECIPES / "dolly" / f"{name}.toml", overrides).recipe
    )
    summary = result["summary"]
    assert summary["personal"]["loss"]["mean"] < summary["base"]["loss"]["mean"]
    assert result["base_is_unchanged"]
    if name == "flex":
        assert list(result["clients"]) == [
            "closed_qa",
            "information_extraction",
            "classification",
            "summarization",
        ]
        assert all(
            client["num_test"] == 100 or client["num_test"] == 20
            for client in result["clients"].values()
        )
