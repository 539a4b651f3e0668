"""A model written as another family is the model that the run measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from federations import quick_recipe, short_model
from orchard.export.folder import export_model
from orchard.export.layouts import why_no_qwen2_moe
from orchard.export.parts import export_adapter
from orchard.models.stored.loading import load_base
from orchard.personal.opening import open_model
from orchard.personal.state import ModelState
from orchard.recipe.options import Recipe
from tiny_deepseek_moe import reference, write
from tiny_exports import FAMILIES, IDS, MASK, checkpoint, logits_of, recipe_on, state_of


def expected_of(state: ModelState) -> torch.Tensor:
    with open_model(state) as opened:
        return logits_of(opened.model)


def check_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, atol=1e-5 * largest, rtol=0)


def stock(folder: Path) -> Any:
    """Load a folder where no code of it may run, and every tensor must have its place."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize(
    ("options", "held", "fields"),
    [
        ((), (), {}),
        (("strategy.graft_gate=none",), (), {}),
        pytest.param(("strategy.graft_kind=dense",), (), {}, marks=pytest.mark.long),
        ((), (), {"sliding_window": 3}),
        pytest.param((), (1, 3, 4), {}, marks=pytest.mark.long),
    ],
)
def test_a_mixtral_with_a_graft_is_a_stock_qwen2_moe(
    options: tuple[str, ...], held: tuple[int, ...], fields: dict[str, Any], tmp_path: Path
) -> None:
    path = Path(checkpoint("mixtral", tmp_path / "base"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))
    method = "flex+hfedmoe" if held else "flex"
    recipe = recipe_on(str(path), "mixtral", method, "strategy.graft_gate=router_row", *options)
    state = state_of(recipe, grafts=(3,), held=held)
    done = export_model(state, tmp_path / "out", shard_bytes=20_000)
    assert done.is_stock
    assert not list((tmp_path / "out").glob("*.py"))
    loaded = stock(tmp_path / "out")
    assert type(loaded) is transformers.Qwen2MoeForCausalLM
    check_close(logits_of(loaded), expected_of(state))
    # Engines have biases whatever the configuration says, and fill them with nothing.
    biases = [t for n, t in tensors_in(tmp_path / "out").items() if n.endswith("_proj.bias")]
    assert len(biases) == 3 * loaded.config.num_hidden_layers
    assert not any(bias.any() for bias in biases)
    with open_model(state) as opened:
        how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        own = opened.model.generate(input_ids=IDS, attention_mask=MASK, **how)
        assert own.tolist() == loaded.generate(IDS, attention_mask=MASK, **how).tolist()
    narrow = state_of(recipe_on(str(path), "mixtral", "fedavg"))
    assert export_model(narrow, tmp_path / "own").is_stock
    assert type(stock(tmp_path / "own")) is transformers.MixtralForCausalLM


BLOCK = {"count": 1, "bias": False, "hidden": 12}
ABOUT = {"mix": "additive", "gate": "router_row", "blocks": [BLOCK, BLOCK]}


def reason(family: str, *, is_uneven: bool = False, **changes: Any) -> str | None:
    config = SimpleNamespace(
        model_type=family,
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        head_dim=changes.pop("head_dim", None),
    )
    stored: Any = SimpleNamespace(whole=SimpleNamespace(model=SimpleNamespace(config=config)))
    return why_no_qwen2_moe(stored, {**ABOUT, **changes}, is_uneven=is_uneven)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_family_with_grafts_is_a_qwen2_moe(family: str) -> None:
    assert (reason(family) is None) == (family == "mixtral")


@pytest.mark.parametrize(
    "change",
    [
        {"gate": "closed"},  # it has a bias, which a shared expert's gate has not
        {"mix": "convex"},
        {"blocks": [{**BLOCK, "count": 2}, BLOCK]},
        {"blocks": [{**BLOCK, "bias": True}, BLOCK]},
        {"blocks": [{**BLOCK, "hidden": 8}, BLOCK]},
        {"blocks": [BLOCK]},
        {"is_uneven": True},
        {"head_dim": 4},
    ],
)
def test_what_a_shared_expert_cannot_say_is_told(change: dict[str, Any]) -> None:
    assert reason("mixtral") is None
    assert reason("mixtral", **change)


def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint("mixtral", tmp_path / "base"), "mixtral", "flex")
    with pytest.raises(ValueError, match="must be asked of a model that is one, got one of which"):
        export_model(state_of(recipe, grafts=(3, 5)), tmp_path / "out", layout="qwen2_moe")
    assert not (tmp_path / "out").exists()


def deepseek(folder: Path, method: str, *, dtype: torch.dtype = torch.float32) -> Recipe:
    folder.mkdir()
    write(folder, {n: t.to(dtype) for n, t in reference().state_dict().items()}, is_sharded=True)
    (folder / "configuration_deepseek.py").write_text("raise RuntimeError('was run')\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(short_model()) / name).read_bytes())
    return quick_recipe(
        method,
        f"model.path={folder}",
        "model.lora_targets=attention,router,experts",
        f"model.dtype={str(dtype).removeprefix('torch.')}",
    )


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_deepseek_moe_comes_back_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    state = state_of(deepseek(base, "fedavg", dtype=dtype))
    done = export_model(state.as_base(), tmp_path / "out", shard_bytes=20_000)
    before, after = tensors_in(base), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == dtype for n in before)
    was, now = (json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out"))
    assert {**was, "dtype": str(dtype).removeprefix("torch.")} == now
    assert done.code == "base"
    assert (tmp_path / "out" / "configuration_deepseek.py").is_file()


def test_a_trained_deepseek_moe_computes_in_its_own_layout(tmp_path: Path) -> None:
    state = state_of(deepseek(tmp_path / "base", "fedavg"))
    export_model(state, tmp_path / "out", shard_bytes=20_000)
    own = reference()
    own.load_state_dict(tensors_in(tmp_path / "out"))
    expected = expected_of(state)
    check_close(logits_of(own), expected)
    assert not torch.allclose(logits_of(reference()), expected, atol=1e-2)
    again = load_base(str(tmp_path / "out"), dtype="float32").view.model
    check_close(logits_of(again), expected)


def test_a_deepseek_moe_without_its_code(tmp_path: Path) -> None:
    recipe = deepseek(tmp_path / "base", "flex")
    state = replace(state_of(recipe), client_id=None)
    assert export_model(state, tmp_path / "stock", layout="qwen2_moe").is_stock
    check_close(logits_of(stock(tmp_path / "stock")), expected_of(state))
    state = state_of(recipe, grafts=(3,))
    assert export_model(state, tmp_path / "grafted").code == "grafts"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "grafted", dtype=torch.float32, trust_remote_code=True
    ).eval()
    check_close(logits_of(loaded), expected_of(state))


def test_an_adapter_that_a_published_deepseek_moe_cannot_take_is_refused(tmp_path: Path) -> None:
    recipe = deepseek(tmp_path / "base", "fedavg")
    with pytest.raises(ValueError, match=r"must be asked of .* attention alone"):
        export_adapter(state_of(recipe), tmp_path / "out")
    narrow = replace(recipe, model=replace(recipe.model, lora_targets="attention"))
    assert export_adapter(state_of(narrow), tmp_path / "out")


def test_a_gate_that_the_layout_cannot_say_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchard.export import merging

    state = state_of(deepseek(tmp_path / "base", "fedavg"))
    real = merging.Merger._checked

    def spoiled(self: merging.Merger, name: str, values: torch.Tensor) -> torch.Tensor:
        return real(self, name, values + (1 if "shared_expert_gate" in name else 0))

    monkeypatch.setattr(merging.Merger, "_checked", spoiled)
    with pytest.raises(ValueError, match="must be zero in a DeepSeek-MoE"):
        export_model(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()
