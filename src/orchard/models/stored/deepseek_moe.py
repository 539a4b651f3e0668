"""DeepSeek-MoE-16B as a Qwen2-MoE, which computes the same, and back to its own layout.

transformers has no class for ``model_type: "deepseek"``, and the code that comes with its
checkpoint is never run. A Qwen2-MoE holds it exactly: attention without biases, dense first layers,
and one shared expert of the width of all shared experts, whose ``down_proj`` is doubled because the
gate before it, which DeepSeek-MoE does not have, is zero: a sigmoid of one half. Doubling loses no
bit.

The router's softmax is in float32 here, and in the model's dtype in the original: in bfloat16 the
weights of chosen experts are not rounded here, and experts whose rounded scores were equal there
may be told apart.

Source: Dai et al., 2024, DeepSeekMoE, arXiv:2401.06066.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen2MoeConfig

MODEL_TYPE = "deepseek"
_SHARED, _PUBLISHED_SHARED = ".mlp.shared_expert.", ".mlp.shared_experts."
_GATE = ".mlp.shared_expert_gate.weight"
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
)
_OPTIONAL = (
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "norm_topk_prob",
    "pad_token_id",
    "quantization_config",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)
_ALLOWED: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (None, False),
    "rope_scaling": (None,),
    "scoring_func": (None, "softmax"),
}


def to_qwen2_moe(published: Mapping[str, Any]) -> Any:
    """Return the config of the Qwen2-MoE that computes what a DeepSeek-MoE does.

    It has one field of its own, ``published_model_type``.

    Args:
        published: The content of its ``config.json``.

    Raises:
        ValueError: It lacks a size, or asks for what a Qwen2-MoE has not.
    """
    needed = (*_SAME, "n_routed_experts", "n_shared_experts")
    if lacking := [name for name in needed if not isinstance(published.get(name), int)]:
        raise ValueError(f"{lacking[0]} must be a whole number, got {published.get(lacking[0])}")
    for name, allowed in _ALLOWED.items():
        if published.get(name) not in allowed:
            raise ValueError(f"{name} must be {allowed[-1]}, got {published[name]}")
    num_layers = published["num_hidden_layers"]
    first, step = published.get("first_k_dense_replace", 0), published.get("moe_layer_freq", 1)
    fields = {name: published[name] for name in _SAME}
    fields |= {name: published[name] for name in _OPTIONAL if published.get(name) is not None}
    own: Any = Qwen2MoeConfig
    return own(
        **{**fields, "architectures": ["Qwen2MoeForCausalLM"]},
        qkv_bias=False,
        use_sliding_window=False,
        decoder_sparse_step=1,
        mlp_only_layers=[n for n in range(num_layers) if n < first or n % step],
        num_experts=published["n_routed_experts"],
        shared_expert_intermediate_size=(
            published["n_shared_experts"] * published["moe_intermediate_size"]
        ),
        published_model_type=MODEL_TYPE,
    )


def is_rewritten(config: object) -> bool:
    """Say whether a config is one of ``to_qwen2_moe``."""
    return getattr(config, "published_model_type", None) == MODEL_TYPE


def to_qwen2_moe_names(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Return the name of each tensor of the Qwen2-MoE, and what it is made of.

    Args:
        names: Those of a published checkpoint.

    Returns:
        To the published name and a factor: 1, or 2 for what is doubled, or 0 for a gate of zeros,
        (1, D), where D is the number of rows of the tensor that is named.
    """
    found = {}
    for name in names:
        own = name.replace(_PUBLISHED_SHARED, _SHARED)
        is_doubled = own != name and own.endswith(".down_proj.weight")
        found[own] = (name, 2 if is_doubled else 1)
        if is_doubled:
            found[own.partition(_SHARED)[0] + _GATE] = (name, 0)
    return found


def to_published_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a DeepSeek-MoE in its own layout, bit for bit what was read.

    Args:
        tensors: Those of the Qwen2-MoE as ``save_pretrained`` writes them, an expert each.

    Raises:
        ValueError: Experts are fused, or a gate is not zero, which the layout cannot say.
    """
    published = {}
    for name, tensor in tensors.items():
        if re.search(r"\.experts\.(gate_up_proj|down_proj)$", name):
            raise ValueError(
                f"tensors must have a name for each expert, got {name}; save the model in its "
                "original format first"
            )
        if name.endswith(_GATE):
            if tensor.any():
                raise ValueError(
                    f"{name} must be zero in a DeepSeek-MoE, got other values; "
                    "write the model as a Qwen2-MoE"
                )
            continue
        own = name.replace(_SHARED, _PUBLISHED_SHARED)
        is_doubled = own != name and own.endswith(".down_proj.weight")
        published[own] = tensor / 2 if is_doubled else tensor
    return published
