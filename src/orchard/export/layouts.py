"""A model written as another family that computes the same, under that family's names.

Two families have such a twin. A Mixtral with one graft is a Qwen2-MoE: the graft is its shared
expert, behind a sigmoid. DeepSeek-MoE, which is trained as a Qwen2-MoE, goes back to the layout in
which it was published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from orchard.export.merging import Entry, mapping_of
from orchard.models.stored.conversion import StoredModel
from orchard.models.stored.deepseek_moe import is_rewritten, to_published_tensors
from orchard.models.stored.sources import make_config

Layout: TypeAlias = Literal["auto", "family", "qwen2_moe"]
LAYOUTS: tuple[Layout, ...] = ("auto", "family", "qwen2_moe")
_TWIN = "qwen2_moe"
_RENAMED = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"(\.experts\.\d+)\.w1\.", r"\1.gate_proj."),
    (r"(\.experts\.\d+)\.w3\.", r"\1.up_proj."),
    (r"(\.experts\.\d+)\.w2\.", r"\1.down_proj."),
)
_SAME = (
    *("vocab_size", "hidden_size", "hidden_act", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    *("initializer_range", "attention_dropout", "tie_word_embeddings", "rope_parameters"),
    *("num_experts_per_tok", "use_cache", "router_aux_loss_coef", "output_router_logits"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def why_no_qwen2_moe(
    stored: StoredModel, grafts: Mapping[str, Any], *, is_uneven: bool
) -> str | None:
    """Say why a model is not exactly a Qwen2-MoE, or None where it is.

    Args:
        stored: The base.
        grafts: What ``merged_grafts`` says of them; ``blocks`` is empty where there are none.
        is_uneven: Whether layers hold different numbers of experts.
    """
    config: Any = stored.whole.model.config
    blocks: Sequence[Mapping[str, Any]] = grafts["blocks"]
    family = "deepseek" if is_rewritten(config) else str(config.model_type)
    if is_uneven:
        return "layers hold different numbers of experts"
    if not blocks:
        return None if family in (_TWIN, "deepseek") else f"it is a {family} without grafts"
    if family != "mixtral":
        return f"a {family} with grafts is none"
    if (config.head_dim or 0) not in (0, config.hidden_size // config.num_attention_heads):
        return "its heads are not as wide as those of a Qwen2-MoE"
    if any(block["count"] != 1 or block["bias"] for block in blocks):
        return "it has several grafts in a layer"
    if grafts["mix"] != "additive" or grafts["gate"] not in ("router_row", "none"):
        return f"strategy.graft_gate is {grafts['gate']} and strategy.graft_mix {grafts['mix']}"
    if len({block["hidden"] for block in blocks}) > 1 or len(blocks) != config.num_hidden_layers:
        return "its layers are not alike"
    return None


def to_qwen2_moe(
    stored: StoredModel,
    entries: Sequence[Entry],
    grafts: Mapping[str, Tensor],
    *,
    num_experts: int,
    top_k: int,
) -> tuple[dict[str, Any], list[Entry]]:
    """Return configuration and tensors of the Qwen2-MoE that computes what a model does.

    Args:
        stored: The base.
        entries: Of everything but grafts.
        grafts: As ``merged_grafts`` names them, one in each layer or none at all.
        num_experts: How many a layer holds.
        top_k: How many a token is sent to.
    """
    config: Any = stored.whole.model.config
    if config.model_type == _TWIN:
        own = config.to_dict()
        own.pop("published_model_type", None)
        own.update(num_experts=num_experts, num_experts_per_tok=top_k, qkv_bias=True)
        return _plain(own), _with_biases(entries)
    tensors, width = _shared_experts(grafts)
    fields = {name: getattr(config, name) for name in _SAME}
    if config.sliding_window is not None:
        fields |= {
            "use_sliding_window": True,
            "sliding_window": config.sliding_window,
            "layer_types": ["sliding_attention"] * config.num_hidden_layers,
        }
    made = make_config(
        _TWIN,
        **{**fields, "num_experts_per_tok": top_k},
        architectures=["Qwen2MoeForCausalLM"],
        qkv_bias=True,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        num_experts=num_experts,
        moe_intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=width,
    )
    renamed = [Entry(_rename(e.name), e.dtype, e.shape, e.parts) for e in entries]
    return _plain(made.to_dict()), [*_with_biases(renamed), *mapping_of(tensors)]


def to_published(entries: Sequence[Entry]) -> list[Entry]:
    """Return the tensors of a DeepSeek-MoE as they were published, of those of its Qwen2-MoE.

    Raises:
        ValueError: A gate is not zero, which the layout cannot say.
    """
    found = []
    for entry in entries:
        (name,) = [*to_published_tensors({entry.name: torch.zeros(())})] or [""]
        if not name:
            to_published_tensors({entry.name: torch.cat(list(entry.parts()))})  # zero, or refused
            continue

        def parts(entry: Entry = entry) -> Iterator[Tensor]:
            for part in entry.parts():
                yield from to_published_tensors({entry.name: part}).values()

        found.append(Entry(name, entry.dtype, entry.shape, parts))
    return found


def _with_biases(entries: Sequence[Entry]) -> list[Entry]:
    """Return tensors with biases of zero for attention that has none.

    Engines that serve Qwen2-MoE have them whatever the configuration says, and leave what no file
    holds as it happens to be.
    """
    names = {entry.name for entry in entries}
    found = []
    for entry in entries:
        found.append(entry)
        bias = entry.name.removesuffix("weight") + "bias"
        if re.search(r"\.self_attn\.[qkv]_proj\.weight$", entry.name) and bias not in names:
            shape, dtype = entry.shape[:1], entry.dtype
            found += mapping_of({bias: torch.zeros(shape, dtype=dtype)})
    return found


def _shared_experts(grafts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Return grafts as shared experts with their gates, and how wide they are.

    A graft without a gate is twice the graft behind a gate of zeros, a sigmoid of one half.
    """
    found: dict[str, Tensor] = {}
    width = 0
    for name, tensor in grafts.items():
        block, _, local = name.partition(".graft.")
        block = _rename(f"{block}.").removesuffix(".")
        gate = f"{block}.shared_expert_gate.weight"
        if local == "opening.weight":
            member = grafts[name.replace(local, "members.0.up_proj.weight")]
            found[gate] = tensor.to(member.dtype)
            continue
        has_gate = name.replace(local, "opening.weight") in grafts
        projection = local.removeprefix("members.0.")
        if projection.startswith("down_proj") and not has_gate:
            tensor, found[gate] = tensor * 2, tensor.new_zeros(1, tensor.shape[0])
        if projection.startswith("up_proj"):
            width = tensor.shape[0]
        found[f"{block}.shared_expert.{projection}"] = tensor
    return found, width


def _rename(name: str) -> str:
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without what transformers adds for itself."""
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    return config
