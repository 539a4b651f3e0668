"""Sections of a recipe become the settings of what they configure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orchard.experts.grafting import GraftSettings
from orchard.experts.importance import ImportanceSettings
from orchard.models.stored.placing import Placement, check_placement
from orchard.models.trainable.targets import LoraSettings
from orchard.models.view.moe import MoEView
from orchard.recipe.method_options import method_names
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.strategies.session import SubsetSettings

_RATE_TIMES_WIDTH = 0.2  # 7.8e-4 at a width of 256, 9.8e-5 at 2048


def learning_rate(recipe: Recipe, view: MoEView) -> float:
    """Return the learning rate of the first round: the recipe's, or by the model's width.

    ``client.lr = 0`` means 0.2 over the width, to two digits. Under Adam every value moves by about
    the rate in a step, and what a product over D values changes by grows with D.

    Source: the constant is ours; that the rate goes with one over the width is from Yang et al.,
    2022, arXiv:2203.03466.
    """
    if recipe.client.lr > 0:
        return recipe.client.lr
    network: Any = view.model
    return float(f"{_RATE_TIMES_WIDTH / network.config.get_text_config().hidden_size:.1e}")


def graft_settings(recipe: Recipe) -> GraftSettings:
    """Return what a client's grafts are made of."""
    s = recipe.strategy
    return GraftSettings(
        kind=s.graft_kind,
        rank=s.graft_rank,
        alpha=s.graft_alpha,
        dropout=s.graft_dropout,
        gate=s.graft_gate,
        mix="difference" if "orchard" in method_names(s.name) else s.graft_mix,
        is_fresh=s.graft_choice == "fresh",
    )


def placement_of(recipe: Recipe) -> Placement:
    """Return where the frozen experts of a recipe's base are.

    Raises:
        ValueError: They cannot be there.
    """
    options = recipe.model
    placement = Placement(options.placement, options.expert_cache, options.frozen_precision)
    check_placement(placement, lora_settings(recipe), device=options.device)
    return placement


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


def check_wanted(wanted: Iterable[tuple[str, object, object, str]], *, beside: str) -> None:
    """Refuse an option that has another value than the one with which a protection holds.

    Args:
        wanted: Of each option its key, the value that it must have, the one that it has, and why.
        beside: The option that asks for the protection.

    Raises:
        ValueError: One has another.
    """
    for key, needed, given, why in wanted:
        if given != needed:
            raise ValueError(f"{key} must be {needed} with {beside}, got {given}; {why}")
