"""Every MoE family of transformers that writes text, through all that a run needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from family_checks import LORA, check
from moe_types import moe_types, text_parts
from orchard.cli import ls
from orchard.client.requirements import Requirements, TrainingShape
from orchard.families import FAMILIES
from orchard.models.stored.carving import check_carvable
from orchard.models.view.detection import view_config
from tiny_composites import COMPOSITES, composite_builder_of
from tiny_families import CONFIGS, builder_of

EVERY_DAY = ("deepseek_v3", "glm4v_moe", "glm_moe_dsa")
# Of the last two, values decide how much attention takes.
PLANNED_EVERY_DAY = ("deepseek_v3", "glm5_next", "qwen4_exp")
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{name: builder_of(name) for name in CONFIGS},
    **{name: composite_builder_of(name) for name in COMPOSITES},
}
# With experts, and no language model of a type's own that they would be part of.
NOT_LANGUAGE = {
    "diffusion_gemma_text",
    "dots3_note_vision_encoder",
    "openai_privacy_filter",
    "qwen3_omni_moe_talker_text",
    "vitpose",
    "vitpose_backbone",
}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.long)
        for name, reason in FAMILIES.items()
        if not reason and name in BUILDERS
    ],
)
def test_a_family_passes_all(family: str, tmp_path: Path) -> None:
    check(BUILDERS[family](), tmp_path)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.long)
        for name, reason in FAMILIES.items()
        if reason and name in BUILDERS
    ],
)
def test_a_family_that_is_said_to_fail_does(family: str, tmp_path: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 -- of which kind the table says in words
        check(BUILDERS[family](), tmp_path)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in PLANNED_EVERY_DAY else pytest.mark.long)
        for name, reason in FAMILIES.items()
        if not reason and name in BUILDERS
    ],
)
def test_a_plan_knows_what_a_family_needs_from_its_configuration_alone(family: str) -> None:
    config = BUILDERS[family]().config
    for is_carved in (False, True):
        shape = TrainingShape(LORA, "float32", 2, 32, "adamw", is_carved, num_choices=1)
        needs = Requirements(config, shape, stored_bytes=0)
        half = needs.peak(needs.footprint.num_experts // 2)
        assert half.activations > 0
        assert half.total <= needs.peak(needs.footprint.num_experts).total
    view = view_config(config)
    check_carvable(view, [range(layer.num_experts // 2) for layer in view.layers])


def test_every_family_that_is_built_is_in_the_table() -> None:
    assert BUILDERS.keys() <= FAMILIES.keys()
    # The others have builders, or tests, of their own.
    passing = {family for family, reason in FAMILIES.items() if not reason}
    assert passing - BUILDERS.keys() == {"deepseek", "qwen3_omni_moe"}


@pytest.mark.long
def test_every_type_with_experts_is_in_the_table() -> None:
    types = dict(moe_types())
    assert {name for name, is_language in types.items() if is_language} <= FAMILIES.keys()
    texts = set().union(*map(text_parts, types))
    others = {name for name, is_language in types.items() if not is_language}
    assert others - texts <= NOT_LANGUAGE, "neither text of another nor known to be something else"
    assert set(FAMILIES) - set(types) == {"deepseek", "mistral3"}


def test_most_families_pass() -> None:
    assert sum(not reason for reason in FAMILIES.values()) >= 70


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    ls("families", as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert {row["family"]: row["reason"] for row in rows} == FAMILIES
    assert all(row["passes"] is (row["reason"] == "") for row in rows)
    ls("families")
    shown = capsys.readouterr().out
    assert all(family in shown for family in ("gemma4_text", "qwen2_moe"))
