"""A learning rate by the size of the model, said before and after a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federations import NUM_LAYERS, prepared, quick_recipe, run_quickly, short_model
from orchard.experiment.planning import make_plan, plan_as_json
from orchard.experiment.running import build_schedule, load_model
from orchard.experiment.settings import learning_rate
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog

AUTO = ("client.lr=0", "client.schedule=constant")


def width() -> int:
    return int(json.loads((Path(short_model()) / "config.json").read_text())["hidden_size"])


def test_a_rate_of_0_is_by_the_models_width_and_any_other_stays() -> None:
    for recipe, expected in (
        (quick_recipe("fedavg", *AUTO), 0.2 / width()),
        (quick_recipe("fedavg", "client.lr=3e-4"), 3e-4),
    ):
        model = load_model(recipe, prepared(recipe).tokenizer)
        found = learning_rate(recipe, model.view)
        assert found == pytest.approx(expected, rel=0.05)
        assert build_schedule(recipe, rate=found).local(1).learning_rate == found


def test_plan_and_result_say_the_rate_that_was_trained_with(tmp_path: Path) -> None:
    recipe = quick_recipe("fedavg", *AUTO, "server.rounds=1", "client.steps=1")
    plan = json.loads(plan_as_json(make_plan(recipe)))
    result = run_quickly(tmp_path / "auto", recipe)
    assert (
        result["learning_rate"] == plan["learning_rate"] == pytest.approx(0.2 / width(), rel=0.05)
    )
    given = quick_recipe(
        "fedavg",
        f"client.lr={result['learning_rate']}",
        *AUTO[1:],
        *("server.rounds=1", "client.steps=1"),
    )
    assert run_quickly(tmp_path / "given", given)["shared_digest"] == result["shared_digest"]


@pytest.mark.parametrize("name", ["orchard", "flex"])
def test_recipes_for_own_data_learn_from_the_first_rounds_on(name: str, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"What is in box {i}?", "response": f"{i} keys.", "category": "ab"[i % 2]}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    overrides = [f"model.path={short_model()}", f"data.path={tmp_path / 'rows.jsonl'}"]
    brief = ["server.rounds=2", "evaluation.models=", "strategy.calibration_blocks=2"]
    own = Path(__file__).parents[2] / f"recipes/own/{name}.toml"
    recipe = read_recipe(own, [*overrides, *brief]).recipe
    assert recipe.client.lr == 0  # by the model's width
    first, second = run_quickly(tmp_path / "run", recipe)["train_loss_per_round"]
    assert second < 0.8 * first  # with 1e-4 it is 0.97 of it


def test_a_result_records_grafts_and_notes(tmp_path: Path) -> None:
    recipe = quick_recipe("flex", "server.rounds=1", "client.steps=1")
    result = run_quickly(tmp_path, recipe)
    assert set(result["grafts"]) == set(result["clients"])
    for line in MetricsLog(tmp_path / "metrics.jsonl"):
        if line["kind"] == "client":
            own = result["grafts"][line["client"]]
            assert len(own) == NUM_LAYERS
            for layer, graft in own.items():
                assert graft["experts"] == [line[f"client/graft_expert_{layer}"]]
                assert graft["loss"] == line[f"client/graft_loss_{layer}"]
    assert isinstance(result["notes"], list)
