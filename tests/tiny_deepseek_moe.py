"""DeepSeek-MoE-16B in miniature, as published, and a reference of its equations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tiny_models import EXPERT_WIDTH, EXPERTS, VOCABULARY, WIDTH, ListedMoE, randomize

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PUBLISHED: dict[str, Any] = {
    **SIZES,
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "attention_bias": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "moe_intermediate_size": EXPERT_WIDTH,
    "moe_layer_freq": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}


def reference(*, is_normalized: bool = False) -> nn.Module:
    """Build multi-head attention with blocks of the original equations in all layers but one."""
    with torch.random.fork_rng():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        about = SimpleNamespace(
            hidden_size=WIDTH,
            moe_intermediate_size=EXPERT_WIDTH,
            n_routed_experts=EXPERTS,
            n_shared_experts=2,
            num_experts_per_tok=2,
            norm_topk_prob=is_normalized,
        )
        for layer in model.model.layers[1:]:
            layer.mlp = ListedMoE(about)
    randomize(model)
    return model.eval()


def write(
    folder: Path, state: Mapping[str, Tensor], *, is_sharded: bool = False, **fields: Any
) -> str:
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **fields}))
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    if not is_sharded:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)
    where = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(state)}
    for file in sorted(set(where.values())):
        own = {name: tensor for name, tensor in state.items() if where[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)
