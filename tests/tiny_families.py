"""A tiny random model of every MoE family in transformers that has a language model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from orchard.models.view.detection import find_auto_class
from tiny_models import randomize

VOCABULARY, WIDTH, EXPERTS, TOP_K, EXPERT_WIDTH = 96, 32, 4, 2, 16


def _sparse_attention() -> str:
    """Return what Qwen4's configuration calls it, which was renamed."""
    config = getattr(transformers, "Qwen4ExpTextConfig", None)
    is_new = config is not None and "indexed_attention" in inspect.getsource(config)
    return "indexed_attention" if is_new else "qwen_sparse_attention"


# What families call their sizes; a config takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "max_window_layers"), 2),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), EXPERTS),
    **dict.fromkeys(("moe_num_experts",), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), TOP_K),
    **dict.fromkeys(("moe_k", "top_k_experts"), TOP_K),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_dim"), EXPERT_WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("shared_expert_intermediate_size", "share_expert_dim"), 20),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 20),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads", "o_groups"), 2),
    **dict.fromkeys(("num_attention_heads", "mamba_dt_rank", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("num_nextn_predict_layers", "num_hash_layers"), 0),
    **dict.fromkeys(("sliding_window", "index_topk"), 64),
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
LATENT: dict[str, Any] = {"num_key_value_heads": 4}
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}

# Model type to the name of its config class and what it needs beside the sizes.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("AfmoeConfig", {}),
    "aria_text": ("AriaTextConfig", {}),
    "axk1": ("AXK1Config", LATENT),
    "axk2": ("AXK2Config", LATENT),
    "bailing_hybrid": ("BailingHybridConfig", {**HYBRID, **LATENT, "layer_group_size": 2}),
    "beam": ("BeamConfig", {"mlp_layer_types": ["dense", "sparse"]}),
    "cohere2_moe": ("Cohere2MoeConfig", {}),
    "deepseek_v2": ("DeepseekV2Config", LATENT),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "deepseek_v32": ("DeepseekV32Config", LATENT),
    "deepseek_v4": ("DeepseekV4Config", {"num_hash_layers": 1}),
    "dots1": ("Dots1Config", {}),
    "dots3_note_text": (
        "Dots3NoteTextConfig",
        {
            **LATENT,
            "head_dim": 16,
            "index_head_dim": 16,
            "layer_types": ["full_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {}),
    "exaone_moe": ("ExaoneMoeConfig", {}),
    "flex_olmo": ("FlexOlmoConfig", {}),
    "flint": ("FlintConfig", {"mlp_only_layers": []}),
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", {}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", LATENT),
    "glm_moe_dsa": ("GlmMoeDsaConfig", LATENT),
    "gpt_oss": ("GptOssConfig", {"intermediate_size": 32}),
    "granitemoe": ("GraniteMoeConfig", {}),
    "granitemoe_swa": ("GraniteMoeSWAConfig", {}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {**HYBRID, "mamba_expand": 2}),
    "granitemoeshared": ("GraniteMoeSharedConfig", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {}),
    "hy_v3": ("HYV3Config", {}),
    "hy_v4": ("HYV4Config", {}),
    "inkling2_text": ("Inkling2TextConfig", {}),
    "inkling_text": ("InklingTextConfig", {}),
    "jamba": (
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "jetmoe": ("JetMoeConfig", {"kv_channels": 8}),
    "kimi_linear": (
        "KimiLinearConfig",
        {**HYBRID, **LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    ),
    "kolibri1": ("Kolibri1Config", {}),
    "laguna": ("LagunaConfig", {}),
    "lfm2_moe": ("Lfm2MoeConfig", {"layer_types": ["conv", "full_attention"]}),
    "llama4_text": ("Llama4TextConfig", {"num_experts_per_tok": 1}),
    "longcat_flash": ("LongcatFlashConfig", {**LATENT, "zero_expert_num": 2}),
    "mellum": ("MellumConfig", {}),
    "mimo_v2_flash": ("MiMoV2FlashConfig", {}),
    "minimax": ("MiniMaxConfig", {}),
    "minimax_m2": ("MiniMaxM2Config", {}),
    "minimax_m3_vl_text": ("MiniMaxM3VLTextConfig", {}),
    "mistral4": ("Mistral4Config", {**LATENT, "head_dim": 16}),
    "mixtral": ("MixtralConfig", {}),
    "nemotron_h": ("NemotronHConfig", {"layers_block_type": ["attention", "moe"]}),
    "olmoe": ("OlmoeConfig", {}),
    "phimoe": ("PhimoeConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", {}),
    "qwen3_5_moe_text": ("Qwen3_5MoeTextConfig", HYBRID),
    "qwen3_moe": ("Qwen3MoeConfig", {}),
    "qwen3_next": ("Qwen3NextConfig", HYBRID),
    "qwen4_exp_text": (
        "Qwen4ExpTextConfig",
        {
            "layer_types": ["linear_attention", _sparse_attention()],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_count": 2,
            "hc_lowrank": 4,
            "ple_layer_ids": [],
            "ngram_vocab_size_base": 100,
            "split_ngram_parts": 1,
            "output_gate_type": "sigmoid",
        },
    ),
    "solar_open": ("SolarOpenConfig", {}),
    "zaya": ("ZayaConfig", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
}


def sized(own: Any, sizes: dict[str, Any], extra: dict[str, Any]) -> Any:
    """Build a config with those of the sizes that it has, and what is extra."""
    known = {*own().to_dict(), *inspect.signature(own.__init__).parameters}
    return own(**{k: v for k, v in sizes.items() if k in known} | extra)


def builder_of(family: str) -> Callable[[], nn.Module]:
    """Return what builds the same random model on every call."""
    name, extra = CONFIGS[family]

    def build() -> nn.Module:
        config = sized(getattr(transformers, name), SIZES, extra)
        config.pad_token_id, config.eos_token_id = 1, 0
        config._experts_implementation = "eager"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = find_auto_class(config).from_config(config, dtype=torch.float32)
        randomize(model)
        return model.eval()

    return build
