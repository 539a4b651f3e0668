"""Qwen1.5-MoE-A2.7B's published layout, in small: its configuration, names and shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from orchard.models.stored.loading import load_base
from orchard.models.stored.placing import Placement, open_base
from orchard.models.view.moe import MoEView

LAYERS, EXPERTS, WIDTH, HIDDEN, SHARED, VOCABULARY = 2, 6, 32, 24, 48, 64
# The keys of the published config.json, with smaller sizes.
CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": SHARED,
    "max_position_embeddings": 256,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": HIDDEN,
    "norm_topk_prob": False,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": SHARED,
}


def published() -> dict[str, Tensor]:
    """Return random tensors under the published names."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in "qkv":
            shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (WIDTH,)
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (WIDTH, WIDTH)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (WIDTH,)
        shapes[f"{prefix}.mlp.gate.weight"] = (EXPERTS, WIDTH)
        shapes[f"{prefix}.mlp.shared_expert_gate.weight"] = (1, WIDTH)
        mlps = {f"experts.{number}": HIDDEN for number in range(EXPERTS)}
        for mlp, width in {**mlps, "shared_expert": SHARED}.items():
            for name in ("gate_proj", "up_proj"):
                shapes[f"{prefix}.mlp.{mlp}.{name}.weight"] = (width, WIDTH)
            shapes[f"{prefix}.mlp.{mlp}.down_proj.weight"] = (WIDTH, width)
    return {
        name: (torch.randn(shape, generator=generator) * 0.2).bfloat16()
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write it in three shards, between which a layer's experts are cut."""
    folder = tmp_path_factory.mktemp("qwen")
    tensors = list(published().items())
    third = -(-len(tensors) // 3)
    weight_map = {}
    for number in range(3):
        own = dict(tensors[number * third : (number + 1) * third])
        name = f"model-{number + 1:05}-of-00003.safetensors"
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def logits(view: MoEView) -> Tensor:
    with torch.no_grad():
        found: Tensor = view.model(input_ids=torch.arange(2, 34)[None], use_cache=False).logits
    return found


def test_every_expert_and_router_is_that_of_its_published_name(checkpoint: Path) -> None:
    written = published()
    view = load_base(str(checkpoint), dtype="bfloat16").view
    assert len(view.layers) == LAYERS
    for index, layer in enumerate(view.layers):
        prefix = f"model.layers.{index}.mlp"
        assert torch.equal(layer.router_tensors()["weight"], written[f"{prefix}.gate.weight"])
        for expert in range(EXPERTS):
            found = layer.expert_tensors(expert)
            assert found.keys() == {"gate_proj", "up_proj", "down_proj"}
            for name, tensor in found.items():
                assert torch.equal(tensor, written[f"{prefix}.experts.{expert}.{name}.weight"])
    dense = {n: t for n, t in written.items() if ".experts." not in n}
    named = view.state()
    for name, tensor in dense.items():
        own = named[name]
        assert isinstance(own, Tensor)
        assert torch.equal(own, tensor)


@pytest.mark.parametrize("cache", ["folder", "none"])
def test_it_computes_the_same_mapped_from_its_shards(
    cache: str, checkpoint: Path, tmp_path: Path
) -> None:
    whole = load_base(str(checkpoint), dtype="bfloat16")
    placement = Placement("mapped", str(tmp_path) if cache == "folder" else cache)
    mapped = open_base(str(checkpoint), dtype="bfloat16", placement=placement)
    assert mapped.digest == whole.digest
    expected = logits(whole.view)
    assert expected.isfinite().all()
    assert torch.equal(logits(mapped.view), expected)
