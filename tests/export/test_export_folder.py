"""An exported folder, loaded without Orchard, is the model that the run measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orchard.export.folder import export_model
from orchard.personal.opening import open_model
from orchard.personal.state import ModelState
from tiny_exports import FAMILIES, IDS, MASK, checkpoint, logits_of, recipe_on, state_of

CARVED = (
    "selection.mode=carve",
    "selection.cadence=run",
    "client.budget=50%",
    "selection.allocation=uniform",
)


def written(model: Any) -> list[list[int]]:
    return model.generate(
        input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, pad_token_id=0
    ).tolist()


def check(state: ModelState, out: Path, *, close: float = 1e-5) -> Any:
    done = export_model(state, out, shard_bytes=20_000)
    loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
        out,
        dtype=torch.float32,
        experts_implementation="eager",
        trust_remote_code=not done.is_stock,
        output_loading_info=True,
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded.eval()
    with open_model(state) as opened:
        expected = logits_of(opened.model)
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(logits_of(loaded), expected, atol=close * largest, rtol=0)
        assert written(loaded) == written(opened.model)
    base = transformers.AutoModelForCausalLM.from_pretrained(state.recipe.model.path)
    assert not torch.allclose(logits_of(loaded), logits_of(base), atol=1e-2)
    return loaded


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES[1:])]
)
def test_a_shared_model_loads_as_its_family(family: str, tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint(family, tmp_path / "base"), family, "fedavg")
    loaded = check(state_of(recipe), tmp_path / "out")
    assert type(loaded).__module__.startswith("transformers.models.")


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES[1:])]
)
@pytest.mark.parametrize("grafts", [(3,), (3, 5)])
def test_a_grafted_model_loads_by_its_own_file(
    family: str, grafts: tuple[int, ...], tmp_path: Path
) -> None:
    recipe = recipe_on(checkpoint(family, tmp_path / "base"), family, "flex")
    check(state_of(recipe, grafts=grafts), tmp_path / "out")


def test_a_carved_model_is_its_family_with_fewer_experts(tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint("qwen2_moe", tmp_path / "base"), "qwen2_moe", "hfedmoe")
    loaded = check(state_of(recipe, held=(1, 4, 6)), tmp_path / "out")
    assert loaded.config.num_experts == 3
    assert type(loaded).__module__.startswith("transformers.models.")
