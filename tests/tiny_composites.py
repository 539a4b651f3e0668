"""Tiny random models of text and something else, such as images, as their publishers write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from tiny_families import CONFIGS, HYBRID, LATENT, SIZES, VOCABULARY, WIDTH, sized
from tiny_models import randomize

# What towers call their sizes: as small as they can be, because text alone goes through.
_TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "adapter_in_dim", "adapter_input_size"), 16),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "moe_intermediate_size"), 16),
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_local_experts", "temporal_merge_size"), 2),
    **dict.fromkeys(("head_dim", "image_size", "downsample_hidden_size", "num_mel_bins"), 8),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim"), WIDTH),
    **dict.fromkeys(("adapter_out_dim", "conv_output_size", "projector_output_dim"), WIDTH),
    **dict.fromkeys(("patch_size", "pos_emb_height", "pos_emb_width", "posemb_grid_size"), 4),
    **dict.fromkeys(("spatial_merge_size", "temporal_patch_size", "adapter_merge_size"), 1),
    **dict.fromkeys(("projector_input_dim", "vision_output_dim", "projection_hidden_dim"), 16),
    **dict.fromkeys(("projection_intermediate_size", "audio_hidden_size"), 16),
    **dict.fromkeys(("num_position_embeddings", "max_source_positions", "n_mel_bins"), 16),
    **dict.fromkeys(("position_embedding_size", "max_position_embeddings"), 64),
    "deepstack_visual_indexes": [0],
    "mlp_layer_types": ["sparse"],
    "num_experts_per_tok": 1,
    "mel_vocab_size": 8,
    "max_img_size": 8,
}


@dataclass(frozen=True)
class Composite:
    """A published model whose text is an MoE.

    Attributes:
        text: Model type of its text.
        extra: What the text's config needs beside the sizes.
        towers: The same for the configs of what else it has, by name.
        root: The same for its own.
    """

    text: str
    extra: dict[str, Any] = field(default_factory=dict)
    towers: dict[str, dict[str, Any]] = field(default_factory=dict)
    root: dict[str, Any] = field(default_factory=dict)


def _of(text: str, **more: Any) -> Composite:
    return Composite(text, CONFIGS[text][1], **more)


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    own = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"head_dim": 16, "rope_parameters": own | more}


_SLIDING = {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 8}
_INKLING = {**_SLIDING, "rel_extent": 8, "d_rel": 4, "unpadded_vocab_size": VOCABULARY}
_OCR = {
    "sam_config": {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "mlp_dim": 16,
        "window_size": 2,
        "global_attn_indexes": [0],
        "downsample_channels": [8, 8],
    },
    "encoder_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 8,
        "max_position_embeddings": 32,
        "image_size": 16,
        "patch_size": 8,
        "max_window_layers": 1,
        "layer_types": None,
    },
}
_SPEECH = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_mel_bins": 8,
    "max_position_embeddings": 16,
}
_SPEAKERS = {"audio_config": _SPEECH, "head_config": {"hidden_size": 16, "audio_hidden_size": 16}}

COMPOSITES: dict[str, Composite] = {
    "aria": Composite("aria_text"),
    "deepseek_ocr2": Composite(
        "deepseek_ocr2_text",
        {"mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1},
        {"vision_config": _OCR},
    ),
    "dots3_note": _of("dots3_note_text"),
    "ernie4_5_vl_moe": Composite(
        "ernie4_5_vl_moe_text", {"moe_intermediate_size": [16, 8], **_rope(3, 3, 2)}
    ),
    "gemma4": _of("gemma4_text"),
    "glm4v_moe": Composite("glm4v_moe_text", _rope(2, 1, 1, partial_rotary_factor=0.5)),
    "glm5_next": Composite(
        "glm5_next_text",
        {
            **LATENT,
            **HYBRID,
            "qk_rope_head_dim": 0,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "hc_mult": 2,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "inkling2": Composite("inkling2_text", _INKLING),
    "inkling_mm_model": Composite(
        "inkling_text",
        _INKLING,
        {"vision_config": {"n_layers": 3, "patch_size": 2, "temporal_patch_size": 2}},
    ),
    "kimi_k25": _of("deepseek_v3"),
    "llama4": _of("llama4_text"),
    "minimax_m3_vl": _of(
        "minimax_m3_vl_text", root={"projector_hidden_size": 16, "merged_hidden_size": 16}
    ),
    "mistral3": _of("mistral4"),
    "mistral_large4": Composite("mistral_large4_text", {**LATENT, "head_dim": 16}),
    "muse_spark": Composite(
        "muse_spark_text",
        {"moe_hidden_size": 24},
        {
            "vision_config": {"layer_types": ["full_attention"]},
            "audio_config": {"patch_sizes": [16], "hidden_sizes": [16], "depths": [1]},
        },
        {"out_hidden_size": WIDTH, "projector_hidden_size": 16},
    ),
    "nemo_speechlm": _of(
        "nemotron_h",
        towers={
            "audio_config": {"asr_config": _SPEECH, "diarization_config": _SPEAKERS},
            "word_timestamp_config": {"vocab_size": 9, "blank_token_id": 8},
        },
    ),
    "nemotron_h_omni": _of(
        "nemotron_h",
        towers={"vision_config": {"video_temporal_patch_size": 2}},
        root={"projector_hidden_size": 16, "vision_hidden_size": 16},
    ),
    "qwen3_5_moe": _of("qwen3_5_moe_text"),
    "qwen3_omni_moe_thinker": Composite("qwen3_omni_moe_text"),
    "qwen3_vl_moe": Composite("qwen3_vl_moe_text"),
    "qwen4_exp": _of("qwen4_exp_text"),
    "step3p7": Composite("step3p5", {"mlp_layer_types": ["dense", "sparse"]}),
    "unlimited_ocr": Composite("unlimited_ocr_text", towers={"vision_config": _OCR}),
}
"""Model type to what it is made of."""


def composite_builder_of(family: str) -> Callable[[], nn.Module]:
    """Return what builds the same random model, towers included, on every call."""
    own = COMPOSITES[family]

    def build() -> nn.Module:
        root: Any = CONFIG_MAPPING[family]
        parts = {"text_config": sized(CONFIG_MAPPING[own.text], SIZES, own.extra).to_dict()}
        default = root()
        for name in root.sub_configs:
            tower = getattr(default, name, None)
            if name != "text_config" and tower is not None:
                extra = own.towers.get(name, {})
                parts[name] = sized(type(tower), _TOWER, extra).to_dict()
        config = root(**parts, **own.root)
        config._experts_implementation = "eager"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # The whole model, also where transformers loads its text alone.
            auto: Any = transformers.AutoModelForMultimodalLM
            model: nn.Module = auto.from_config(config, dtype=torch.float32)
        randomize(model)
        return model.eval()

    return build
