"""DeepSeek-MoE-16B, in miniature and as published, beside a reference of its equations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from family_checks import check_names, check_trained, logits_of
from orchard.models.stored.deepseek_moe import to_published_tensors, to_qwen2_moe
from orchard.models.stored.loading import check_checkpoint, load_base
from orchard.models.stored.sources import load_config
from orchard.models.stored.streaming import checkpoint_reader, streamed_experts
from orchard.models.stored.submodel import load_skeleton, load_submodel
from orchard.models.trainable.targets import LoraSettings
from tiny_deepseek_moe import PUBLISHED, reference, write
from tiny_models import VOCABULARY

IDS_BS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("is_normalized", [False, True])
@pytest.mark.parametrize("is_sharded", [False, True])
@torch.no_grad()
def test_the_published_layout_computes_the_original_equations(
    is_normalized: bool, is_sharded: bool, tmp_path: Path
) -> None:
    original = reference(is_normalized=is_normalized)
    path = write(
        tmp_path, original.state_dict(), is_sharded=is_sharded, norm_topk_prob=is_normalized
    )
    expected = original(input_ids=IDS_BS).logits
    checked = check_checkpoint(path, LoraSettings(2, 4.0, 0.0, ("attention", "router", "experts")))
    assert not checked.notes
    whole = load_base(path, dtype="float32").view
    torch.testing.assert_close(whole.model(input_ids=IDS_BS).logits, expected, rtol=0, atol=1e-5)
    skeleton = load_skeleton(path, dtype="float32")
    with streamed_experts(skeleton, checkpoint_reader(path, "float32")):
        streamed = skeleton.model(input_ids=IDS_BS).logits
    torch.testing.assert_close(streamed, expected, rtol=0, atol=1e-5)
    some = load_submodel(path, [[0, 3, 5], [1, 2]], dtype="float32")
    assert all(torch.equal(some.read(name), whole.read(name)) for name in some.names())


def test_it_is_trained_as_any_family(tmp_path: Path) -> None:
    model = load_base(write(tmp_path, reference().state_dict()), dtype="float32").view.model
    check_names(model)
    check_trained(model, logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_original_layout_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: t.to(dtype) for name, t in reference().state_dict().items()}
    path = write(tmp_path, state)
    base = load_base(path, dtype=str(dtype).removeprefix("torch."))
    base.view.model.save_pretrained(tmp_path / "saved")
    back = to_published_tensors(load_file(tmp_path / "saved" / "model.safetensors"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_what_the_layout_cannot_say_is_not_written() -> None:
    gate = {"model.layers.1.mlp.shared_expert_gate.weight": torch.ones(1, 4)}
    with pytest.raises(ValueError, match="must be zero in a DeepSeek-MoE"):
        to_published_tensors(gate)
    fused = {"model.layers.1.mlp.experts.down_proj": torch.ones(2, 4, 4)}
    with pytest.raises(ValueError, match="must have a name for each expert"):
        to_published_tensors(fused)


def test_what_stands_for_the_layout_is_never_trained(tmp_path: Path) -> None:
    path = write(tmp_path, reference().state_dict())
    with pytest.raises(ValueError, match="must not be all for a deepseek model"):
        check_checkpoint(path, LoraSettings(2, 4.0, 0.0, (), ("all",)))
    check_checkpoint(path, LoraSettings(2, 4.0, 0.0, (), ("experts", "router", "attention")))


@pytest.mark.parametrize("lost", ["shared_experts.down_proj", "shared_experts.up_proj", "gate.w"])
def test_a_tensor_that_is_missing_is_named(lost: str, tmp_path: Path) -> None:
    state = {n: t for n, t in reference().state_dict().items() if f"layers.2.mlp.{lost}" not in n}
    with pytest.raises(ValueError, match=r"must hold every tensor of its model.*layers\.2\.mlp"):
        load_base(write(tmp_path, state), dtype="float32")


@pytest.mark.parametrize(
    ("field", "value"),
    [("attention_bias", True), ("scoring_func", "sigmoid"), ("n_shared_experts", None)],
)
def test_a_config_that_no_qwen2_moe_computes_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        to_qwen2_moe({**PUBLISHED, field: value})


def test_a_model_with_code_of_its_own_is_told_so(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": torch.zeros(1)}, model_type="orchid")
    with pytest.raises(ValueError, match="model_type orchid, which has code of its own; that is"):
        load_config(path)
