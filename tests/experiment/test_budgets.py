"""Budgets follow from memory, and what cannot work is refused before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from federations import tiny_recipe
from orchard.client.requirements import Requirements
from orchard.experiment.budgets import (
    build_requirements,
    client_limits,
    expert_budgets,
    graft_elements,
)
from orchard.experiment.settings import lora_settings
from orchard.experts.grafting import GraftSettings, grafted
from orchard.models.stored.loading import check_model
from orchard.models.trainable.targets import LoraSettings
from orchard.models.view.moe import MoEView
from orchard.recipe.options import Recipe
from tiny_adapted import adapt

CARVED = ("selection.mode=carve", "selection.cadence=round", "client.budget=")
NUM_EXPERTS, NUM_LAYERS = 32, 4


def meta_view(recipe: Recipe) -> MoEView:
    return check_model(recipe.model.path, lora_settings(recipe))


def budgets_of(*overrides: str, method: str = "hfedmoe") -> tuple[int | None, ...]:
    recipe = tiny_recipe(method, *CARVED, *overrides)
    return expert_budgets(recipe, meta_view(recipe), num_clients=4)


@cache
def requirements_of(*overrides: str) -> Requirements:
    recipe = tiny_recipe("hfedmoe", *CARVED, *overrides)
    return build_requirements(recipe, meta_view(recipe))


@cache
def peak(budget: int, *overrides: str) -> int:
    return requirements_of(*overrides).peak(budget).total


def test_a_larger_budget_never_needs_less_memory() -> None:
    for targets in ("lora_targets=experts,router", "full_targets=all"):
        own = [f"model.{targets}"]
        if targets.startswith("full"):
            own.append("model.lora_targets=")
        found = [peak(b, *own) for b in (4, 5, 8, 16, 31, 32)]
        assert found == sorted(found)
        assert found[-1] > found[0]


def test_memory_affords_the_most_experts_whose_peak_is_within_it() -> None:
    caps = [peak(4), peak(11) + 1, peak(12) - 1, 10**10]
    found = budgets_of(f"client.memory_bytes={', '.join(map(str, caps))}")
    for cap, budget in zip(caps, found, strict=True):
        assert budget is not None
        assert peak(budget) <= cap
        assert budget == NUM_EXPERTS or peak(budget + 1) > cap
    assert found[0] >= 4
    assert found[3] == NUM_EXPERTS


@pytest.mark.long
def test_memory_can_be_drawn_and_stays_for_the_run() -> None:
    text = f"client.memory_bytes=uniform({peak(4)}, {peak(32)})"
    first, again = budgets_of(text), budgets_of(text)
    assert first == again
    assert len(set(first)) > 1
    assert all(b is not None and NUM_LAYERS <= b <= NUM_EXPERTS for b in first)


def test_too_little_memory_says_by_how_much() -> None:
    with pytest.raises(ValueError, match=r"below the dense part of the model alone") as error:
        budgets_of("client.memory_bytes=10GB, 100MB, 10GB, 10GB")
    message = str(error.value)
    assert message.startswith("client.memory_bytes must hold training with one expert in each of")
    assert "got 0.1 GB for client 2" in message
    dense = build_requirements(
        recipe := tiny_recipe("hfedmoe", *CARVED), meta_view(recipe)
    ).footprint.dense_bytes
    missing = re.search(r"client 2, ([0-9.]+) GB below", message)
    assert missing is not None
    assert float(missing[1]) * 1e9 == pytest.approx(560e6 + dense - 100e6, rel=0.01)


def test_memory_between_the_dense_part_and_training_is_too_little_too() -> None:
    cap = peak(4) - 1_000_000
    with pytest.raises(ValueError, match=r"for client 1, 1 MB too little"):
        budgets_of(f"client.memory_bytes={cap}")


@pytest.mark.parametrize("key", ["client.memory_bytes=1GB, 2GB", "client.budget=25%, 50%"])
def test_a_list_of_the_wrong_length_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"one for each of the 4 clients, got 2 in"):
        budgets_of(key)


@pytest.mark.parametrize("budget", ["0", "0%"])
def test_a_budget_of_zero_is_refused(budget: str) -> None:
    with pytest.raises(ValueError, match=r"^client\.budget must be numbers of experts or shares"):
        budgets_of(f"client.budget={budget}")


def test_the_smallest_budget_that_works_is_named() -> None:
    with pytest.raises(ValueError, match=r"the smallest that works is 4, or 12\.5%$"):
        budgets_of("client.budget=3")
    assert budgets_of("client.budget=12.5%") == (4,) * 4


def test_budget_and_memory_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"must not both be given"):
        budgets_of("client.budget=50%", "client.memory_bytes=1GB")


def test_only_a_method_with_budgets_takes_one() -> None:
    with pytest.raises(ValueError, match=r"^client\.memory_bytes must come with hfedmoe"):
        tiny_recipe("fedavg", "client.memory_bytes=1GB")
    recipe = tiny_recipe("fedavg")
    recipe = replace(recipe, client=replace(recipe.client, memory_bytes="1GB"))
    with pytest.raises(ValueError, match=r"^client\.memory_bytes must be empty with strategy"):
        expert_budgets(recipe, meta_view(recipe), num_clients=4)


def test_who_cannot_take_part_is_said_without_raising() -> None:
    recipe = tiny_recipe("hfedmoe", *CARVED, "client.memory_bytes=100MB, 10GB, 10GB, 10GB")
    first, *others = client_limits(recipe, meta_view(recipe), num_clients=4)
    assert (first.budget, first.memory_bytes) == (0, 10**8)
    assert first.reason
    assert all(limit.budget == NUM_EXPERTS and not limit.reason for limit in others)


def test_no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("orchard.models.stored.loading._load", refuse)
    monkeypatch.setattr("orchard.models.stored.tensors.Checkpoint.read", refuse)
    assert budgets_of("client.memory_bytes=10GB") == (NUM_EXPERTS,) * 4


@pytest.mark.parametrize("kind", ["lora", "dense"])
@pytest.mark.parametrize("gate", ["router_row", "closed", "none"])
def test_grafts_are_counted_as_they_are(kind: str, gate: str) -> None:
    model = adapt("qwen2_moe")
    settings = GraftSettings(kind=kind, rank=3, alpha=6.0, gate=gate)
    experts: Sequence[int] = [0] * len(model.view.layers)
    with grafted(model, experts, settings, seed=0) as grafts:
        real = sum(tensor.numel() for tensor in model.read(grafts.names).values())
    assert sum(graft_elements(layer, settings) for layer in model.view.layers) == real


def test_settings_of_lora_are_those_of_the_recipe() -> None:
    recipe = tiny_recipe("hfedmoe", "model.lora_rank=3", "model.lora_alpha=5.0")
    assert lora_settings(recipe) == LoraSettings(
        rank=3, alpha=5.0, dropout=0.0, targets=lora_settings(recipe).targets, full=()
    )
