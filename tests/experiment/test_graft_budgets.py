"""What grafts add to a client's plan, before any model is loaded."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from federations import build, short_first, tiny_recipe
from orchard.communication.messages import LocalSettings, Task
from orchard.experiment.budgets import build_requirements, graft_elements
from orchard.experiment.planning import make_plan
from orchard.experiment.settings import graft_settings, lora_settings
from orchard.models.stored.loading import check_model
from orchard.recipe.options import Recipe
from orchard.strategies.strategy import start_server, train_client


def personal_of(recipe: Recipe) -> int:
    view = check_model(recipe.model.path, lora_settings(recipe))
    return build_requirements(recipe, view).personal


# Every pair of options once.
@pytest.mark.parametrize(
    ("kind", "gate", "number"),
    short_first(
        [
            ("lora", "router_row", 1),
            ("dense", "router_row", 2),
            ("lora", "closed", 2),
            ("dense", "closed", 1),
            ("lora", "none", 2),
            ("dense", "none", 1),
        ],
        itertools.product(["lora", "dense"], ["router_row", "closed", "none"], [1, 2]),
    ),
)
def test_a_plan_counts_what_a_client_keeps(
    kind: str, gate: str, number: int, tmp_path: Path
) -> None:
    recipe = tiny_recipe(
        "flex",
        f"strategy.graft_kind={kind}",
        f"strategy.graft_gate={gate}",
        f"strategy.graft_experts={number}",
        "strategy.graft_choice=random",
    )
    strategy, (client, *_), model, _ = build(recipe, tmp_path)
    task = Task(1, start_server(strategy, model.fresh).shared, LocalSettings(1, 0, 1e-3))
    train_client(strategy, client, task)
    kept = client.store.load(before_round=2)
    assert kept is not None
    actual = sum(t.numel() for name, t in kept.tensors.items() if not name.endswith(".expert"))
    assert personal_of(recipe) == actual


@pytest.mark.parametrize("gate", ["router_row", "closed", "none"])
def test_a_budget_of_grafts_counts_the_most_that_it_allows(gate: str) -> None:
    gates = f"strategy.graft_gate={gate}"
    each = {
        number: personal_of(tiny_recipe("flex", gates, f"strategy.graft_experts={number}"))
        for number in (1, 2, 3)
    }
    counted = [
        personal_of(
            tiny_recipe("flex", gates, "strategy.graft_experts=3", f"strategy.graft_budget={n}")
        )
        for n in range(4, 13)
    ]
    # Four layers that are alike: one graft in each, then as many second ones as there are.
    assert counted[0] == each[1]
    assert counted[-1] == each[3]
    assert counted == sorted(counted)
    assert counted[4] == each[2]
    recipe = tiny_recipe("flex", gates)
    layer = check_model(recipe.model.path, lora_settings(recipe)).layers[0]
    one, two, three = (
        graft_elements(layer, graft_settings(recipe), number=number) for number in (1, 2, 3)
    )
    assert counted[1] == 3 * one + two
    assert counted[5] == 3 * two + three


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("strategy.graft_experts=9",), r"strategy\.graft_experts must be in 1\.\.8, got 9; "),
        (
            ("strategy.graft_experts=2", "strategy.graft_budget=9"),
            r"strategy\.graft_budget must be 0 or in 4\.\.8, got 9; ",
        ),
    ],
)
@pytest.mark.parametrize("method", ["flex", "flex+hfedmoe"])
def test_a_plan_refuses_grafts_that_do_not_fit(
    method: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make_plan(tiny_recipe(method, *overrides))
