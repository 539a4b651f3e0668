"""Tiny checkpoints on disk, by family, in the ways that transformers writes them."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tiny_models import FAMILIES, batch_of, randomize

GROUPED = ("deepseek_v2", "deepseek_v3")
LISTED = ("switch", "deepseek_moe_16b")
FUSED = tuple(family for family in FAMILIES if family not in LISTED)


def build_one_group(family: str) -> nn.Module:
    """Build a family with all its experts in one group, as its smaller checkpoints have."""
    model = FAMILIES[family]()
    if family not in GROUPED:
        return model
    config = copy.deepcopy(model.config)
    config.n_group = config.topk_group = 1
    config._experts_implementation = "eager"
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    return model.eval()


def save(family: str, folder: Path, **options: object) -> str:
    """Write a checkpoint of the family, in its original format unless told otherwise."""
    build_one_group(family).save_pretrained(folder, **options)
    return str(folder)


def load_whole(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load what ``from_pretrained`` makes of a checkpoint, with eager experts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation="eager"
    )
    return model.eval()


def logits_of(model: Any) -> Tensor:
    """Run a tiny model on its batch."""
    with torch.no_grad():
        return model(**batch_of(model)).logits
