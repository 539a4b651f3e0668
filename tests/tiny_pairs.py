"""A tiny random Switch on disk, an encoder-decoder, with the packaged tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from orchard.models.stored.loading import resolve, without_progress_bars
from tiny_models import SWITCH, randomize

EXPERTS = 4


def tiny_switch(*, size: int, capacity: int = 64, **fields: Any) -> Any:
    """Build a Switch of the family's own class, whose two MoE layers have four experts each."""
    own: Any = SwitchTransformersConfig
    config = own(
        vocab_size=size,
        d_model=16,
        d_ff=12,
        num_experts=EXPERTS,
        expert_capacity=capacity,
        **SWITCH,
        **{"router_jitter_noise": 0.0, "dropout_rate": 0.0, **fields},
    )
    with torch.random.fork_rng():
        model: Any = SwitchTransformersForConditionalGeneration(config)
    randomize(model)
    return model.eval()


def write_switch(folder: Path, **fields: Any) -> str:
    """Write a tiny Switch with the packaged tokenizer, and return where."""
    tiny = Path(resolve("orchard:tiny"))
    about = json.loads((tiny / "config.json").read_text())
    with without_progress_bars():
        ends = {name: about[name] for name in ("eos_token_id", "pad_token_id")}
        tiny_switch(size=about["vocab_size"], **ends, **fields).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / name)
    return str(folder)
