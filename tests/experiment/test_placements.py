"""What a plan says of every placement and precision is what a process of its own needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from federations import quick_recipe
from orchard.experiment.budgets import build_requirements
from orchard.experiment.placements import Free, PlacementPlan
from orchard.experiment.planning import make_plan, plan_as_json
from orchard.experiment.settings import lora_settings
from orchard.measurements.client_memory import Case, measure, predict
from orchard.models.stored.loading import check_checkpoint
from orchard.models.stored.placing import Placement
from orchard.models.stored.random_checkpoint import Shape, write_random_checkpoint

# Experts of 0.6 GB in bfloat16, and little else.
SHAPE = Shape(layers=8, width=256, heads=4, experts=32, expert_width=1536, shared_width=256)
ATTENTION = ("q_proj", "k_proj", "v_proj")


def of(plans: tuple[PlacementPlan, ...]) -> dict[tuple[str, str], PlacementPlan]:
    return {(plan.placement, plan.precision): plan for plan in plans}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("random")
    write_random_checkpoint(folder, SHAPE, dtype="bfloat16", seed=0)
    return Case(
        str(folder),
        full_targets=(),
        lora_targets=ATTENTION,
        dtype="bfloat16",
        batch_size=4,
        num_tokens=64,
        steps=2,
        num_threads=1,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("placement", "precision", "targets"),
    [
        ("memory", "bf16", ATTENTION),
        ("memory", "bf16", (*ATTENTION, "experts")),
        ("memory", "int8", ATTENTION),
        ("memory", "nf4", ATTENTION),
        ("mapped", "bf16", ATTENTION),
        ("mapped", "bf16", (*ATTENTION, "experts")),
        ("mapped", "int8", ATTENTION),
        ("mapped", "nf4", ATTENTION),
    ],
)
def test_the_predicted_peak_is_within_10_percent(
    case: Case, placement: str, precision: str, targets: tuple[str, ...]
) -> None:
    own = replace(case, placement=placement, precision=precision, lora_targets=targets)
    measured = measure(own)["peak_anonymous_bytes"]
    assert predict(own).anonymous == pytest.approx(measured, rel=0.1)


def test_fewer_bits_and_mapped_experts_need_less() -> None:
    plan = make_plan(quick_recipe("flex"))
    found = {key: own.predicted_anonymous_bytes or 0 for key, own in of(plan.placements).items()}
    assert len(found) == 9
    memory = [found["memory", precision] for precision in ("nf4", "int8", "bf16")]
    assert memory == sorted(set(memory))
    assert found["mapped", "bf16"] < found["memory", "bf16"]
    client = json.loads(plan_as_json(plan))["clients"][0]
    assert client["predicted_anonymous_bytes"] == found["memory", "bf16"]


def test_what_fits_and_what_is_refused_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "orchard.experiment.placements.available_memory_bytes"
    monkeypatch.setattr(name, lambda: 1 << 40)
    adapted = make_plan(quick_recipe("hfedmoe", "client.budget=25%")).placements
    assert {key: own.fits for key, own in of(adapted).items()} == {
        **dict.fromkeys([("memory", "bf16"), ("mapped", "bf16")], True),
        **{(kind, bits): False for kind in ("memory", "mapped") for bits in ("int8", "nf4")},
        **{("offload", bits): False for bits in ("bf16", "int8", "nf4")},
    }
    reason = of(adapted)["memory", "nf4"].reason
    assert reason.startswith("model.frozen_precision must be bf16 with experts")
    monkeypatch.setattr(name, lambda: 1000)
    shown = json.loads(plan_as_json(make_plan(quick_recipe("flex"))))
    assert not any(row["fits"] for row in shown["placements"])
    assert shown["free_bytes"] == 1000
    monkeypatch.setattr(name, lambda: None)
    fits = of(make_plan(quick_recipe("flex")).placements)
    assert {own.fits for (kind, _), own in fits.items() if kind != "offload"} == {None}


def test_what_a_gpu_would_hold_is_said_without_one() -> None:
    recipe = quick_recipe("fedavg", "model.path=orchard:tiny")  # four layers
    found = of(make_plan(recipe).placements)
    assert found["memory", "bf16"].predicted_device_bytes is None
    offload = [found["offload", bits] for bits in ("nf4", "int8", "bf16")]
    assert all("set model.placement to mapped" in own.reason and not own.fits for own in offload)
    on_gpu = [own.predicted_device_bytes or 0 for own in offload]
    assert on_gpu == sorted(set(on_gpu))
    # Two of four layers are there at a time, and all four are in the host's memory.
    requirements = build_requirements(
        recipe, check_checkpoint(recipe.model.path, lora_settings(recipe)).view
    )
    experts = sum(
        size * number
        for size, number in zip(
            requirements.footprint.expert_bytes.values(),
            requirements.footprint.layers.values(),
            strict=True,
        )
    )
    budget = requirements.footprint.num_experts
    whole = requirements.peak(budget)
    offloaded = requirements.placed(Placement("offload")).peak(budget)
    assert whole.device - offloaded.device == experts // 2
    assert offloaded.offloaded == experts
    assert requirements.placed(Placement("offload", "folder")).peak(budget).offloaded == 0
    holds = Free(offloaded.host, offloaded.device)
    assert holds.holds(offloaded.host, offloaded.device)
    assert not holds.holds(offloaded.host, offloaded.device + 1)
    assert not holds.holds(offloaded.host + 1, offloaded.device)
    assert Free(1, None).holds(1, 1) is None


def test_carved_clients_have_no_placements(tmp_path: Path) -> None:
    recipe = quick_recipe("hfedmoe", "selection.mode=carve", "selection.cadence=round")
    assert make_plan(recipe).placements == ()
