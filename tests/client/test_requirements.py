"""What training needs in memory, part by part."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from federations import build, quick_recipe
from orchard.client.requirements import Requirements
from orchard.experiment.budgets import build_requirements
from orchard.experiment.settings import lora_settings
from orchard.models.stored.loading import check_model

CARVED = ("selection.mode=carve", "selection.cadence=round", "client.budget=")
FLOAT = 4


@cache
def requirements_of(*overrides: str, method: str = "hfedmoe") -> Requirements:
    recipe = quick_recipe(method, *CARVED, *overrides)
    return build_requirements(recipe, check_model(recipe.model.path, lora_settings(recipe)))


def test_trainable_elements_are_those_of_the_model(tmp_path: Path) -> None:
    _, _, model, _ = build(quick_recipe("hfedmoe", *CARVED), tmp_path)
    found, elements = requirements_of(), {n: t.numel() for n, t in model.fresh.items()}
    sizes = list(found.footprint.layers.values())
    for kind in ("all", "lora"):
        assert found.trainable(sizes, kind=kind) == sum(elements.values())
    rest = sum(number for name, number in elements.items() if ".experts." not in name)
    assert found.trainable([0] * len(sizes)) == rest
    one = sum(n for name, n in elements.items() if ".experts.0." in name)
    assert found.trainable([1] * len(sizes)) == rest + one


def test_what_is_trained_itself_is_no_adapter() -> None:
    full = ("model.lora_targets=q_proj", "model.full_targets=experts,router")
    found = requirements_of(*full)
    sizes = list(found.footprint.layers.values())
    assert 0 < found.trainable(sizes, kind="lora") < found.trainable(sizes)
    # No expert has an adapter.
    assert found.trainable(sizes, kind="lora") == found.trainable([0] * len(sizes), kind="lora")


def test_a_budget_is_spread_evenly_and_the_first_layers_take_the_rest() -> None:
    assert requirements_of().spread(5) == (3, 2)
    assert requirements_of().spread(1000) == tuple(requirements_of().footprint.layers.values())


def test_each_part_of_the_peak_is_of_what_is_held() -> None:
    adamw, sgd = requirements_of(), requirements_of("client.optimizer=sgd")
    peak, plain = adamw.peak(5), sgd.peak(5)
    held = FLOAT * adamw.trainable(adamw.spread(5))
    assert (peak.adapters, peak.received, peak.gradients) == (held, held, held)
    # Two moments of what was ever moved; plain SGD keeps none.
    assert (peak.optimizer, plain.optimizer) == (2 * held, 0)
    assert peak.total - plain.total == 2 * held


def test_what_is_personal_is_trained_and_never_received() -> None:
    shared, joined = requirements_of(), requirements_of(method="flex+hfedmoe")
    plain, peak, own = shared.peak(5), joined.peak(5), FLOAT * joined.personal
    assert own > 0
    assert peak.adapters - plain.adapters == own
    assert peak.gradients - plain.gradients == own
    assert peak.optimizer - plain.optimizer == 2 * own
    assert peak.received == plain.received


def test_activations_are_of_tokens_and_not_of_parameters() -> None:
    found = [requirements_of(f"data.max_tokens={n}").peak(5).activations for n in (32, 64, 128)]
    # Attention keeps scores of every pair of tokens; all else is for each token.
    assert 2 * found[0] <= found[1] < 4 * found[0]
    assert 2 * found[1] <= found[2] < 4 * found[1]
