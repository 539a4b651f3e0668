"""Tiny random MoE models, one builder per family: two layers or three, float32, built in memory.

``FAMILIES[name]()`` returns a model in eval mode with random weights that are the same on every
call. All have a vocabulary of 64 and 8 routed experts of width 12 on a model of width 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.aria import modeling_aria

VOCABULARY = 64
WIDTH = 16
EXPERT_WIDTH = 12
EXPERTS = 8

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give every weight a random value of useful size; zero-initialized routers included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * 0.4)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def build(config_name: str, **fields: Any) -> nn.Module:
    """Build a random model from the name of its transformers config class."""
    config = getattr(transformers, config_name)(**fields)
    config._experts_implementation = "eager"
    is_pair = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if is_pair else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        model = auto.from_config(config, dtype=torch.float32)
    assert model.config._experts_implementation == "eager"
    randomize(model)
    return model.eval()


def _causal(config_name: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: build(config_name, **{**_COMMON, **fields})


def dense() -> nn.Module:
    """Build a model without experts."""
    fields = {k: v for k, v in _COMMON.items() if k != "num_experts_per_tok"}
    return build("Qwen2Config", **fields, intermediate_size=EXPERT_WIDTH)


def _aria() -> nn.Module:
    if not hasattr(modeling_aria, "AriaTextTopKRouter"):
        pytest.skip("these transformers have Aria's experts behind a call of their own")
    return build(
        "AriaTextConfig",
        **_COMMON,
        moe_num_experts=EXPERTS,
        moe_topk=2,
        moe_num_shared_experts=2,
        intermediate_size=EXPERT_WIDTH,
    )


# Of Switch, beside its sizes.
SWITCH: Mapping[str, int] = MappingProxyType(
    {
        "d_kv": 8,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
)


def _switch() -> nn.Module:
    return build(
        "SwitchTransformersConfig",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_ff=EXPERT_WIDTH,
        num_experts=EXPERTS,
        expert_capacity=64,
        **SWITCH,
    )


class ListedConfig(transformers.PreTrainedConfig):
    """The fields of DeepSeek-MoE-16B's remote code that its MoE block reads."""

    model_type = "tiny_listed_moe"

    vocab_size: int = VOCABULARY
    hidden_size: int = WIDTH
    moe_intermediate_size: int = EXPERT_WIDTH
    n_routed_experts: int = EXPERTS
    n_shared_experts: int = 2
    num_experts_per_tok: int = 2
    num_hidden_layers: int = 3
    norm_topk_prob: bool = False


class ListedMLP(nn.Module):
    """One expert."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden_width, bias=False)
        self.up_proj = nn.Linear(width, hidden_width, bias=False)
        self.down_proj = nn.Linear(hidden_width, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ListedRouter(nn.Module):
    """A router that demands (B, S, D), and keeps its logits to itself."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, None]:
        _, _, width = hidden.shape
        scores_TE = functional.linear(hidden.view(-1, width), self.weight).softmax(dim=-1)
        weights_TK, choices_TK = scores_TE.topk(self.top_k, dim=-1, sorted=False)
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return choices_TK, weights_TK, None


class ListedMoE(nn.Module):
    """Routed experts in a list, plus shared experts that no gate weighs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        widths = (config.hidden_size, config.moe_intermediate_size)
        self.num_experts_per_tok = config.num_experts_per_tok
        self.experts = nn.ModuleList(ListedMLP(*widths) for _ in range(config.n_routed_experts))
        self.gate = ListedRouter(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = ListedMLP(config.hidden_size, shared)

    def forward(self, hidden: Tensor) -> Tensor:
        choices_TK, weights_TK, _ = self.gate(hidden)
        flat = hidden.view(-1, hidden.shape[-1])
        repeated = flat.repeat_interleave(self.num_experts_per_tok, dim=0)
        y = torch.empty_like(repeated)
        for index, expert in enumerate(self.experts):
            chosen = choices_TK.view(-1) == index
            y[chosen] = expert(repeated[chosen])
        y = (y.view(*weights_TK.shape, -1) * weights_TK.unsqueeze(-1)).sum(dim=1)
        return y.view(hidden.shape) + self.shared_experts(hidden)


class ListedAttention(nn.Module):
    """Causal attention with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).mT / math.sqrt(x.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.o_proj(scores.masked_fill(future, -math.inf).softmax(dim=-1) @ self.v_proj(x))


class ListedLayer(nn.Module):
    """Attention, then an MLP or an MoE."""

    def __init__(self, config: Any, is_dense: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self_attn = ListedAttention(width)
        self.input_layernorm = nn.RMSNorm(width)
        self.post_attention_layernorm = nn.RMSNorm(width)
        self.mlp = ListedMLP(width, 2 * width) if is_dense else ListedMoE(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class ListedModel(nn.Module):
    """Embedding and layers, of which the first is dense."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(ListedLayer(config, is_dense=i == 0) for i in layers)
        self.norm = nn.RMSNorm(config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ListedForCausalLM(transformers.PreTrainedModel):
    """Built like DeepSeek-MoE-16B's remote code; right padding needs no attention mask."""

    config_class = ListedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = ListedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        logits = self.lm_head(self.model(input_ids))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutput(loss=loss, logits=logits)


def _listed() -> nn.Module:
    with torch.random.fork_rng():
        model = ListedForCausalLM(ListedConfig())
    randomize(model)
    return model.eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "qwen2_moe": _causal(
        "Qwen2MoeConfig",
        num_experts=EXPERTS,
        intermediate_size=24,
        moe_intermediate_size=EXPERT_WIDTH,
        shared_expert_intermediate_size=20,
        decoder_sparse_step=1,
    ),
    "qwen3_moe": _causal(
        "Qwen3MoeConfig",
        num_experts=EXPERTS,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=EXPERT_WIDTH,
        norm_topk_prob=True,
    ),
    "qwen3_next": _causal(
        "Qwen3NextConfig",
        num_experts=EXPERTS,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=EXPERT_WIDTH,
        shared_expert_intermediate_size=20,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
    ),
    "olmoe": _causal("OlmoeConfig", num_experts=EXPERTS, intermediate_size=EXPERT_WIDTH),
    "mixtral": _causal(
        "MixtralConfig", num_local_experts=EXPERTS, intermediate_size=EXPERT_WIDTH, head_dim=8
    ),
    "phimoe": _causal("PhimoeConfig", num_local_experts=EXPERTS, intermediate_size=EXPERT_WIDTH),
    "deepseek_v2": _causal(
        "DeepseekV2Config",
        **_LATENT,
        n_routed_experts=EXPERTS,
        n_shared_experts=2,
        n_group=2,
        topk_group=1,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.5,
        intermediate_size=24,
        moe_intermediate_size=EXPERT_WIDTH,
        first_k_dense_replace=1,
        num_hidden_layers=3,
    ),
    "deepseek_v3": _causal(
        "DeepseekV3Config",
        **_LATENT,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
        intermediate_size=24,
        moe_intermediate_size=EXPERT_WIDTH,
        first_k_dense_replace=1,
        num_hidden_layers=3,
    ),
    "granitemoe": _causal(
        "GraniteMoeConfig", num_local_experts=EXPERTS, intermediate_size=EXPERT_WIDTH
    ),
    "gpt_oss": _causal(
        "GptOssConfig",
        num_local_experts=EXPERTS,
        intermediate_size=EXPERT_WIDTH,
        head_dim=8,
        sliding_window=8,
    ),
    "aria": _aria,
    "nemotron_h": _causal(
        "NemotronHConfig",
        layers_block_type=["attention", "moe", "attention", "moe"],
        num_hidden_layers=4,
        head_dim=8,
        n_routed_experts=EXPERTS,
        moe_intermediate_size=EXPERT_WIDTH,
        moe_shared_expert_intermediate_size=20,
        intermediate_size=24,
    ),
    "afmoe": _causal(
        "AfmoeConfig",
        num_experts=EXPERTS,
        num_shared_experts=1,
        num_dense_layers=1,
        num_hidden_layers=3,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=EXPERT_WIDTH,
    ),
    "switch": _switch,
    "deepseek_moe_16b": _listed,
}
"""Name to builder. ``switch`` is an encoder-decoder; ``deepseek_moe_16b`` and ``switch`` list
their experts, ``aria`` and ``gpt_oss`` store them transposed, ``nemotron_h`` has no gate."""


def batch_of(model: nn.Module, *, seed: int = 1, num_padding: int = 0) -> dict[str, Tensor]:
    """Draw inputs for ``model``: two sequences of 7 tokens, the second padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if num_padding:
        input_ids[1, -num_padding:] = 0
        attention_mask[1, -num_padding:] = 0
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
    return batch
