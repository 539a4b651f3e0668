"""Which MoE families of transformers pass all tests of a family, and why others do not.

A family is a ``model_type`` as published: a model of text and images stands under the name of the
whole, and its text is what trains. MoE layers are found by their interface, so this is what was
tried and not what is allowed: tests build a tiny random model of each, and hold this table against
it.
"""

from __future__ import annotations

from collections.abc import Mapping

TESTED = (
    "names to tensors and back bit for bit, saved and loaded, streamed, carved, adapters on "
    "attention, routers and experts, grafts, masked experts, whole rounds of FLEx and of HFedMoE, "
    "masked and carved"
)
"""What passing means."""

FAMILIES: Mapping[str, str] = {
    "afmoe": "",
    "aria": "",
    "aria_text": "",
    "axk1": "",
    "axk2": "",
    "bailing_hybrid": "",
    "beam": "",
    "cohere2_moe": "",
    "dbrx": (
        "its experts are flat matrices of all experts, behind no interface that names one of "
        "them; it would take a storage of its own"
    ),
    "deepseek": "",
    "deepseek_ocr2": "",
    "deepseek_v2": "",
    "deepseek_v3": "",
    "deepseek_v32": "",
    "deepseek_v4": (
        "its first layers route by token id, so they cannot be carved; it would take a table "
        "of ids for the experts that are kept"
    ),
    "diffusion_gemma": (
        "it fills in blocks of text by diffusion and predicts no next token; it would take a loss "
        "over noised blocks, and answers that are written so"
    ),
    "doge": (
        "its experts are embeddings that a product of keys retrieves; there is none to freeze "
        "or to carve; it would take names and a budget for rows of embeddings"
    ),
    "dots1": "",
    "dots3_note": "",
    "dots3_note_text": "",
    "ernie4_5_moe": "",
    "ernie4_5_vl_moe": (
        "its checkpoint keeps experts for text and for images in one list, so they cannot be "
        "read one by one; it would take a conversion that tells them apart"
    ),
    "exaone_moe": "",
    "flex_olmo": "",
    "flint": "",
    "gemma4": "",
    "gemma4_assistant": (
        "it drafts tokens for a Gemma 4 from that model's own cache, and answers nothing alone; it "
        "would take training it beside that model"
    ),
    "gemma4_text": "",
    "glm4_moe": "",
    "glm4_moe_lite": "",
    "glm4v_moe": "",
    "glm5_next": "",
    "glm_moe_dsa": "",
    "gpt_oss": "",
    "granitemoe": "",
    "granitemoe_swa": "",
    "granitemoehybrid": "",
    "granitemoeshared": "",
    "hunyuan_v1_moe": "",
    "hy_v3": "",
    "hy_v4": "",
    "inkling2": "",
    "inkling2_text": "",
    "inkling_mm_model": "",
    "inkling_text": "",
    "jamba": "",
    "jetmoe": (
        "its experts are two stacks of inputs and outputs, behind no interface that names one "
        "of them; it would take a storage of its own, also for its experts in attention"
    ),
    "kimi_k25": "",
    "kimi_linear": "",
    "kolibri1": "",
    "laguna": "",
    "lfm2_moe": "",
    "llama4": "",
    "llama4_text": "",
    "longcat_flash": (
        "its experts are stacked, and some of them do nothing, behind no interface that names "
        "one of them; it would take a storage of its own"
    ),
    "mellum": "",
    "mimo_v2_flash": "",
    "minimax": "",
    "minimax_m2": "",
    "minimax_m3_vl": "",
    "minimax_m3_vl_text": "",
    "mistral3": "",
    "mistral4": "",
    "mistral_large4": "",
    "mixtral": "",
    "muse_spark": "",
    "nemo_speechlm": "",
    "nemotron_h": "",
    "nemotron_h_omni": "",
    "nllb-moe": (
        "in transformers 5.23 its own class takes a mask of experts for their numbers and runs "
        "experts 0 and 1 alone; it would take a class that runs those that its router chose"
    ),
    "olmoe": "",
    "phimoe": "",
    "qwen2_moe": "",
    "qwen3_5_moe": "",
    "qwen3_5_moe_text": "",
    "qwen3_moe": "",
    "qwen3_next": "",
    "qwen3_omni_moe": "",
    "qwen3_omni_moe_thinker": "",
    "qwen3_vl_moe": "",
    "qwen4_exp": "",
    "qwen4_exp_text": "",
    "solar_open": "",
    "step3p7": "",
    "switch_transformers": (
        "an encoder-decoder: all of it but grafts and rounds of FLEx, which choose experts on text "
        "without an encoder; it would take calibration on pairs of prompt and response"
    ),
    "unlimited_ocr": "",
    "zaya": "",
}
"""Family to the reason why it does not pass all of it; empty where it does."""


def families_as_rows() -> list[dict[str, str | bool]]:
    """Return the table for programs: ``family``, ``passes`` and ``reason``."""
    return [
        {"family": family, "passes": not reason, "reason": reason}
        for family, reason in FAMILIES.items()
    ]
