"""Checkpoints with random weights, for measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from orchard.models.stored.loading import DTYPES
from orchard.models.view.moe import MoEView


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-MoE model.

    Attributes:
        layers: MoE layers, all of them.
        width: D.
        heads: Of attention.
        experts: E, routed, in each layer.
        top_k: K.
        expert_width: F of a routed expert.
        shared_width: F of the shared expert.
        vocabulary: V; input and output embeddings are one tensor.
        dense_layers: The first so many layers have no experts, beside ``layers``.
        dense_width: F of these.
    """

    layers: int = 8
    width: int = 512
    heads: int = 8
    experts: int = 32
    top_k: int = 2
    expert_width: int = 1024
    shared_width: int = 512
    vocabulary: int = 4096
    dense_layers: int = 0
    dense_width: int = 512

    def config(self) -> Any:
        """Return the transformers config of this shape."""
        return Qwen2MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.dense_layers + self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.expert_width,
            shared_expert_intermediate_size=self.shared_width,
            intermediate_size=self.dense_width,
            mlp_only_layers=list(range(self.dense_layers)),
            tie_word_embeddings=True,
            eos_token_id=0,
            pad_token_id=1,
        )


def write_random_checkpoint(folder: Path, shape: Shape, *, dtype: str, seed: int) -> None:
    """Write a model without tokenizer to ``folder``, as ``save_pretrained`` does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2MoeForCausalLM(shape.config())
    model.to(DTYPES[dtype]).save_pretrained(folder)


def expert_share(view: MoEView) -> float:
    """Return the share of a model's parameters that are in routed experts."""
    experts = sum(p.numel() for layer in view.layers for p in layer.storage.parameters())
    return experts / sum(p.numel() for p in view.model.parameters())
