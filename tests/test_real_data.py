"""On real text, where it is at hand: beside the checkout, in shared/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federations import RECIPES, run_quickly
from orchard.engine.progress import Silent
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import run_experiment
from orchard.recipe.reading import read_recipe

SHARED = Path(__file__).parent.parent.parent / "shared"
MODEL, DOLLY = (
    SHARED / "models" / "base-9m",
    SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl",
)
CATEGORIES = ("closed_qa", "information_extraction", "classification", "summarization")

pytestmark = pytest.mark.skipif(
    not (MODEL.is_dir() and DOLLY.is_file()),
    reason="needs a real model and Dolly in ../shared, which are not part of the project",
)


@pytest.fixture(scope="module")
def some_dolly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with forty examples of each of FLEx's four categories."""
    rows: dict[str, list[str]] = {}
    for line in DOLLY.read_text().splitlines():
        rows.setdefault(json.loads(line)["category"], []).append(line)
    path = tmp_path_factory.mktemp("dolly") / "some.jsonl"
    path.write_text("\n".join(line for category in CATEGORIES for line in rows[category][:40]))
    return path


@pytest.mark.long
def test_a_step_on_real_text_leaves_the_base_alone(some_dolly: Path, tmp_path: Path) -> None:
    overrides = [
        f"model.path={MODEL}",
        f"data.path={some_dolly}",
        "data.test_size=2",
        "data.max_tokens=96",
        "server.rounds=1",
        "client.steps=2",
        "client.batch_size=2",
        "evaluation.models=personal",
        "evaluation.metrics=loss",
        "evaluation.max_examples=2",
        "strategy.calibration_blocks=1",
    ]
    result = run_quickly(
        tmp_path, read_recipe(RECIPES / "dolly" / "flex_closed.toml", overrides).recipe
    )
    assert 0 < result["summary"]["personal"]["loss"]["mean"] < 10
    assert result["base_is_unchanged"]
    assert tuple(result["clients"]) == CATEGORIES


@pytest.mark.long
@pytest.mark.parametrize("name", ["flex_closed", "dirichlet_flex_majority"])
def test_flex_runs_on_real_text(name: str, some_dolly: Path, tmp_path: Path) -> None:
    overrides = [
        f"model.path={MODEL}",
        f"data.path={some_dolly}",
        "server.rounds=2",
        "client.steps=8",
        "client.lr=0.002",
        "data.max_tokens=128",
        "evaluation.metrics=loss,rouge_l",
        "evaluation.max_new_tokens=8",
        "evaluation.max_examples=6",
        "strategy.graft_gate=closed",
        "strategy.calibration_blocks=2",
    ]
    if "dirichlet" in name:
        overrides += [
            "data.num_clients=2",
            "data.examples_per_client=60",
            "data.test_per_category=5",
        ]
    else:
        overrides += ["data.test_size=10"]
    recipe = read_recipe(RECIPES / "dolly" / f"{name}.toml", overrides).recipe
    result = run_quickly(tmp_path, recipe)
    summary = result["summary"]
    # A handful of steps moves every model, and each client's own way.
    losses = [summary[model]["loss"]["mean"] for model in ("base", "global", "local", "personal")]
    assert len(set(losses)) == 4
    assert 0 < summary["personal"]["rouge_l"]["mean"] < 1
    assert result["base_is_unchanged"]
    if name == "flex_closed":  # each client is tested on what it trains on
        assert summary["personal"]["loss"]["mean"] < summary["base"]["loss"]["mean"]
        assert tuple(result["clients"]) == CATEGORIES


CHOICES = {
    "ag_news": ("ag_news.jsonl", 4),
    "piqa": ("validation.jsonl", 2),
    "mmlu": ("val.jsonl", 4),
}


# The options of each data set's own recipe are read in tests of data; here a model chooses.
@pytest.mark.long
@pytest.mark.parametrize("name", CHOICES)
def test_options_of_real_data_are_chosen_from(name: str, tmp_path: Path) -> None:
    file, num_options = CHOICES[name]
    path = SHARED / "data" / name / file
    if not path.is_file():
        pytest.skip(f"needs {file} of {name} in ../shared, which is not part of the project")
    (tmp_path / file).write_text("\n".join(path.read_text().splitlines()[:120]))
    overrides = [
        f"model.path={MODEL}",
        f"data.path={tmp_path / file}",
        "data.test_per_category=3",
        "server.rounds=2",
        "client.steps=3",
        "client.batch_size=4",
        "evaluation.max_examples=8",
        "evaluation.metrics=loss,accuracy",
    ]
    recipe = read_recipe(RECIPES / name / "fedavg.toml", overrides).recipe
    experiment = prepare_experiment(recipe)
    held_out = experiment.test["client_00"]
    assert {len(example.options) for example in held_out} == {num_options}
    # What a model is asked in a test is what it is trained on, shortened prompts included.
    assert all(example.options[example.answer] == example.encoded for example in held_out)
    summary = run_experiment(experiment, folder=tmp_path / "run", reporter=Silent())["summary"]
    assert summary["global"]["loss"]["mean"] < summary["base"]["loss"]["mean"]
    for model in ("base", "global"):
        accuracy = summary[model]["accuracy"]
        num_right = accuracy["mean"] * len(held_out)
        assert num_right == pytest.approx(round(num_right))
        # One model on one test set: the clients do not differ.
        assert (accuracy["spread"], accuracy["worst"]) == (0.0, accuracy["mean"])
