"""Small random bases of the families that exports are tried with, and the runs on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from orchard.models.stored.deepseek_moe import to_published_tensors
from orchard.models.stored.sources import resolve

EXPERTS, WIDTH, EXPERT_WIDTH = 8, 64, 48
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": EXPERTS,
    "intermediate_size": 96,
    "moe_intermediate_size": EXPERT_WIDTH,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
_LOCAL = {"num_local_experts": EXPERTS, "intermediate_size": EXPERT_WIDTH}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "qwen2_moe": (
            "Qwen2MoeConfig",
            {
                "num_experts": EXPERTS,
                "moe_intermediate_size": EXPERT_WIDTH,
                "shared_expert_intermediate_size": 80,
                "intermediate_size": 96,
            },
        ),
        "qwen3_moe": (
            "Qwen3MoeConfig",
            {
                "num_experts": EXPERTS,
                "moe_intermediate_size": EXPERT_WIDTH,
                "head_dim": 32,
                "norm_topk_prob": True,
                "intermediate_size": 96,
            },
        ),
        "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS, "intermediate_size": EXPERT_WIDTH}),
        "mixtral": ("MixtralConfig", _LOCAL),
        "deepseek_v2": ("DeepseekV2Config", {**_LATENT, "n_shared_experts": 2}),
        "deepseek_v3": (
            "DeepseekV3Config",
            {**_LATENT, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        ),
        "gpt_oss": ("GptOssConfig", {**_LOCAL, "head_dim": 32, "sliding_window": 32}),
        "granitemoe": ("GraniteMoeConfig", _LOCAL),
        "deepseek": (
            "Qwen2MoeConfig",
            {
                "num_experts": EXPERTS,
                "moe_intermediate_size": EXPERT_WIDTH,
                "shared_expert_intermediate_size": 2 * EXPERT_WIDTH,
                "intermediate_size": 96,
                "qkv_bias": False,
                "norm_topk_prob": False,
                "mlp_only_layers": [0],
                "num_hidden_layers": 3,
            },
        ),
    }
)
"""Family to the name of its configuration and what is not as in every other."""
LATENT = ("deepseek_v2", "deepseek_v3")
DEEPSEEK_MOE = "deepseek"
"""DeepSeek-MoE-16B, which is written in its published layout."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_base(family: str, folder: Path) -> str:
    """Write a random base of a family, with the packaged model's tokenizer."""
    packaged = Path(resolve("orchard:tiny"))
    name, fields = FAMILIES[family]
    known = transformers.AutoConfig.from_pretrained(packaged)
    config = getattr(transformers, name)(
        **{
            "vocab_size": known.vocab_size,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "num_experts_per_tok": 2,
            "bos_token_id": known.bos_token_id,
            "eos_token_id": known.eos_token_id,
            "pad_token_id": known.pad_token_id,
            **fields,
        }
    )
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise) if parameter.ndim == 1 else parameter.copy_(0.2 * noise)
            if family == DEEPSEEK_MOE and parameter.shape == (1, WIDTH):
                parameter.zero_()  # it has no gate before its shared experts
    model.save_pretrained(folder)
    if family == DEEPSEEK_MOE:
        _publish(folder, config)
    for file in _TOKENIZER:
        shutil.copyfile(packaged / file, folder / file)
    return str(folder)


def _publish(folder: Path, config: Any) -> None:
    """Give a Qwen2-MoE the layout in which DeepSeek-MoE-16B was published."""
    file = folder / "model.safetensors"
    save_file(to_published_tensors(load_file(file)), file, metadata={"format": "pt"})
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("num_experts_per_tok", "max_position_embeddings", "rms_norm_eps"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    about = {name: getattr(config, name) for name in same} | {
        "model_type": DEEPSEEK_MOE,
        "architectures": ["DeepseekForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
    }
    (folder / "config.json").write_text(json.dumps(about))
