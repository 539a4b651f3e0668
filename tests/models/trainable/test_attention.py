"""The word attention means a family's own projections to queries, keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchard.models.trainable.targets import LoraSettings, check_targets, find_targets
from orchard.models.view.detection import view_moe
from orchard.recipe.run_options import ModelOptions
from tiny_adapted import adapt
from tiny_models import EXPERT_WIDTH, EXPERTS, FAMILIES, WIDTH, build

LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
PLAIN = ("q_proj", "k_proj", "v_proj")
OWN = {"deepseek_v2": LATENT, "deepseek_v3": LATENT, "switch": {"q", "k", "v"}}


class TowerAttention(nn.Module):
    """Attention of a tower that has no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_what_a_family_has_for_it(family: str) -> None:
    view = view_moe(FAMILIES[family]())
    found = find_targets(view, ("attention",))
    assert {path.rpartition(".")[2] for path in found[0]} == OWN.get(family, set(PLAIN))
    if family not in OWN:
        assert found == find_targets(view, PLAIN), "runs that named them go on with the same"


def test_attention_is_the_default() -> None:
    assert ModelOptions().lora_targets == "attention"


def test_the_same_seed_gives_the_same_adapters_by_the_word_and_by_names() -> None:
    word, names = adapt(targets=("attention",)), adapt(targets=PLAIN)
    assert word.adapter_names == names.adapter_names
    assert all(torch.equal(word.fresh[name], names.fresh[name]) for name in names.fresh)


def test_one_fused_projection_is_attention() -> None:
    model = FAMILIES["qwen2_moe"]()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.Wqkv = nn.Linear(16, 48)
        del attention.q_proj, attention.k_proj, attention.v_proj
    modules, _ = find_targets(view_moe(model), ("attention",))
    assert modules == [f"model.layers.{n}.self_attn.Wqkv" for n in range(2)]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_tower_without_experts_gets_no_adapter(family: str) -> None:
    model = FAMILIES[family]()
    plain, _ = find_targets(view_moe(model), ("attention",))
    model.tower = nn.Module()
    model.tower.layers = nn.ModuleList([TowerAttention()])
    assert find_targets(view_moe(model), ("attention",))[0] == plain


def test_a_model_without_such_layers_is_told_so_in_one_line() -> None:
    model = FAMILIES["qwen2_moe"]()
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    with pytest.raises(ValueError, match=r"has no projections to queries, keys and values; name"):
        find_targets(view_moe(model), ("attention",))


def test_what_attention_means_cannot_be_trained_in_two_ways() -> None:
    view = view_moe(FAMILIES["qwen2_moe"]())
    lora = LoraSettings(2, 4.0, 0.0, ("attention",), ("k_proj",))
    with pytest.raises(ValueError, match=r"model\.full_targets must not name .* got k_proj"):
        check_targets(view, lora)


def test_attention_beside_experts_in_the_decoder_layer_itself_is_found() -> None:
    model = build(
        "Gemma4TextConfig",
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=WIDTH,
        hidden_size_per_layer_input=0,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_global_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        intermediate_size=24,
        enable_moe_block=True,
        num_experts=EXPERTS,
        top_k_experts=2,
        moe_intermediate_size=EXPERT_WIDTH,
    )
    view = view_moe(model)
    modules, _ = find_targets(view, ("attention",))
    assert {path.rpartition(".")[2] for path in modules} <= set(PLAIN)
    assert {path.split(".self_attn.")[0] for path in modules} == {
        layer.path for layer in view.layers
    }
    with pytest.raises(ValueError, match="must name linear layers"):
        find_targets(view, ("proj",))  # the router's own
