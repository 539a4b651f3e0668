"""Sections of a recipe become the settings of what they configure."""

from __future__ import annotations

from orchard.experts.grafting import GraftSettings
from orchard.experts.importance import ImportanceSettings
from orchard.models.trainable.targets import LoraSettings
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.strategies.session import SubsetSettings


def graft_settings(recipe: Recipe) -> GraftSettings:
    """Return what a client's grafts are made of."""
    s = recipe.strategy
    return GraftSettings(
        kind=s.graft_kind,
        rank=s.graft_rank,
        alpha=s.graft_alpha,
        dropout=s.graft_dropout,
        gate=s.graft_gate,
        mix=s.graft_mix,
    )


def subset_settings(recipe: Recipe) -> SubsetSettings:
    """Return how clients choose the experts that they train."""
    s = recipe.selection
    return SubsetSettings(
        mode=s.mode,
        rank_by=s.rank_by,
        cadence=s.cadence,
        every=s.every,
        scoring_batches=s.scoring_batches,
        importance=ImportanceSettings(
            cumulative_weight=s.cumulative_weight, beta=s.beta, level=s.level, softmax=s.softmax
        ),
        usage_mode=s.usage_mode,
    )


def lora_settings(recipe: Recipe) -> LoraSettings:
    """Return what of the model a recipe trains.

    Raises:
        ValueError: The base's dtype is too narrow for it.
    """
    options = recipe.model
    targets, full = words(options.lora_targets), words(options.full_targets)
    if not targets and not full:
        raise ValueError(
            "model.lora_targets or model.full_targets must name something, got nothing in both; "
            "name linear layers, router or experts"
        )
    if full and options.dtype != "float32":
        raise ValueError(
            f"model.dtype must be float32 with model.full_targets, got {options.dtype}; "
            "small steps would be rounded away"
        )
    return LoraSettings(
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        targets=targets,
        full=full,
    )
