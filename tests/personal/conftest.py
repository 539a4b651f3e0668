"""A run whose clients have grafts, for tests that look at it and change nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from federations import quick_recipe, run_quickly


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with_grafts") / "run"
    recipe = quick_recipe(
        "flex",
        "server.rounds=1",
        "client.steps=2",
        "client.lr=0.05",
        "evaluation.metrics=loss",
        "evaluation.models=personal",
        "evaluation.max_examples=2",
        "strategy.calibration_blocks=1",
    )
    run_quickly(folder, recipe)
    return folder
