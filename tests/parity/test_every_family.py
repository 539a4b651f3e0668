"""Every MoE family of transformers with a causal language model, through all that a run needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from family_checks import check
from orchard.cli import ls
from orchard.families import FAMILIES
from tiny_families import CONFIGS, builder_of

EVERY_DAY = ("deepseek_v3", "glm_moe_dsa")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in EVERY_DAY else pytest.mark.long)
        for name, reason in FAMILIES.items()
        if not reason and name in CONFIGS
    ],
)
def test_a_family_passes_all(family: str, tmp_path: Path) -> None:
    check(builder_of(family)(), tmp_path)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.long)
        for name, reason in FAMILIES.items()
        if reason and name in CONFIGS
    ],
)
def test_a_family_that_is_said_to_fail_does(family: str, tmp_path: Path) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 -- of which kind the table says in words
        check(builder_of(family)(), tmp_path)


def test_every_family_that_is_built_is_in_the_table() -> None:
    assert CONFIGS.keys() <= FAMILIES.keys()


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    ls("families", as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert {row["family"]: row["reason"] for row in rows} == FAMILIES
    assert all(row["passes"] is (row["reason"] == "") for row in rows)
    ls("families")
    shown = capsys.readouterr().out
    assert all(family in shown for family in ("gemma4_text", "qwen2_moe"))
