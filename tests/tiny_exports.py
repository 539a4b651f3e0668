"""Trained models of tiny random families, as states of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from federations import quick_recipe, short_model
from orchard.experiment.settings import graft_settings, lora_settings
from orchard.experts.grafting import grafted
from orchard.models.stored.loading import load_base, load_tokenizer
from orchard.models.trainable.adapters import AdaptedModel
from orchard.personal.state import ModelState
from orchard.recipe.options import Recipe
from tiny_adapted import targets_of
from tiny_checkpoints import build_one_group

IDS = torch.tensor([[5, 17, 40, 9, 3, 8], [0, 0, 7, 30, 2, 61]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
FAMILIES = [
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
]


def checkpoint(family: str, folder: Path) -> str:
    build_one_group(family).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(short_model()) / name, folder)
    return str(folder)


def recipe_on(path: str, family: str, method: str, *overrides: str) -> Recipe:
    targets = ",".join((*targets_of(family), "router", "experts"))
    return quick_recipe(method, f"model.path={path}", f"model.lora_targets={targets}", *overrides)


def drawn(names: dict[str, torch.Tensor], *, size: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: t + size * torch.randn(t.shape, generator=generator) for n, t in names.items()}


def state_of(
    recipe: Recipe, *, grafts: tuple[int, ...] = (), held: tuple[int, ...] = ()
) -> ModelState:
    """Return a model whose every tensor has changed."""
    path, dtype = recipe.model.path, recipe.model.dtype
    base = load_base(path, dtype=dtype)
    model = AdaptedModel(
        base.view,
        lora_settings(recipe),
        tokenizer=load_tokenizer(path),
        base_digest=base.digest,
        seed=0,
    )
    layers = [layer.name for layer in base.view.layers]
    own: dict[str, torch.Tensor] = {}
    if grafts:
        settings = graft_settings(recipe)
        with grafted(model, [grafts] * len(layers), settings, seed=1) as attached:
            own = drawn(model.read(attached.names))
    return ModelState(
        recipe,
        "north" if grafts or held else None,
        1,
        base.digest,
        drawn(dict(model.fresh)),
        own,
        dict.fromkeys(layers, grafts) if grafts else {},
        dict.fromkeys(layers, held) if held else None,
    )


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
