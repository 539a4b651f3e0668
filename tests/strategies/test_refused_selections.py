"""Choices of experts that cannot work are refused before any model is loaded."""

from __future__ import annotations

import pytest

from federations import tiny_recipe
from orchard.experiment.preparation import prepare_experiment

# The packaged tiny model has 4 MoE layers of 8 experts.


@pytest.mark.parametrize("usage_mode", ["softmax_mean", "hit_rate", "relative"])
def test_a_threshold_that_stands_for_a_usage_above_1_is_refused(usage_mode: str) -> None:
    mode = f"selection.usage_mode={usage_mode}"
    prepare_experiment(tiny_recipe("hfedmoe", "selection.threshold=8.0", mode))
    with pytest.raises(ValueError, match=r"^selection\.threshold must be at most 8, got 8\.01; .*"):
        prepare_experiment(tiny_recipe("hfedmoe", "selection.threshold=8.01", mode))


@pytest.mark.parametrize("method", ["hfedmoe", "fedmoe"])
@pytest.mark.parametrize("budget", ["3", "12%"])
def test_a_budget_below_one_expert_a_layer_is_refused(method: str, budget: str) -> None:
    with pytest.raises(
        ValueError, match=r"^client\.budget must afford one expert in each of the 4"
    ):
        prepare_experiment(tiny_recipe(method, f"client.budget={budget}"))


def test_who_affords_nothing_drops_out_where_dropping_out_is_the_method() -> None:
    experiment = prepare_experiment(tiny_recipe("fedavg_dropout", "client.budget=3"))
    assert set(experiment.budgets.values()) == {0}


def test_the_balancing_loss_of_a_carved_model_is_refused() -> None:
    """It counts the experts of the configuration, and a carved router has fewer."""
    recipe = tiny_recipe(
        "hfedmoe",
        "selection.mode=carve",
        "selection.cadence=round",
        "client.router_aux_coefficient=0.1",
    )
    with pytest.raises(ValueError, match=r"^client\.router_aux_coefficient must be 0 with"):
        prepare_experiment(recipe)


def test_a_budget_without_experts_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must name experts with strategy\.name = hfedmoe"):
        prepare_experiment(tiny_recipe("hfedmoe", "model.lora_targets=q_proj,router"))


@pytest.mark.parametrize("cadence", ["batch", "steps"])
def test_a_carved_client_cannot_choose_between_steps(cadence: str) -> None:
    recipe = tiny_recipe("hfedmoe", "selection.mode=carve", f"selection.cadence={cadence}")
    with pytest.raises(ValueError, match=r"^selection\.cadence must be round or run with"):
        prepare_experiment(recipe)
