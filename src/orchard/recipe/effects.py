"""Which options have an effect, given the rest of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from orchard.recipe.method_options import BUILT_IN, method_names
from orchard.recipe.options import Recipe

Need: TypeAlias = tuple[bool, str]
"""Whether an option has an effect, and what it takes."""

_GRAFT_LORA = ("strategy.graft_rank", "strategy.graft_alpha", "strategy.graft_dropout")
_GRAFT_SEARCH = ("strategy.graft_budget", "strategy.graft_loss", "strategy.graft_max_sets")
_SUBSETS = ("hfedmoe", "fedavg_random", "pflmoe", "fedmoe", "seermoe")


def check_is_used(recipe: Recipe, keys: Sequence[str]) -> None:
    """Refuse an override that the rest of the recipe leaves without effect.

    A method of one's own may read any option that others read.

    Args:
        recipe: The recipe, overrides included.
        keys: What was overridden.

    Raises:
        ValueError: An option has no effect.
    """
    data, methods = recipe.data, method_names(recipe.strategy.name)
    has_own = not {*BUILT_IN} >= {*methods}
    grafts = bool({"flex", "orchard"} & set(methods))
    is_lora = recipe.strategy.graft_kind == "lora"
    adaptive = bool({"fedadam", "fedyogi"} & set(methods))
    is_drawn = data.partition in ("iid", "dirichlet", "dirichlet_resample")
    needs: dict[str, Need] = {
        "data.num_clients": (is_drawn, "data.partition = iid or a Dirichlet one"),
        "data.alpha": ("dirichlet" in data.partition, "a Dirichlet data.partition"),
        "data.examples_per_client": (
            data.partition == "dirichlet_resample",
            "data.partition = dirichlet_resample",
        ),
        "data.categories": (data.partition != "file", "another data.partition than file"),
        "data.test_per_category": (data.partition != "file", "another data.partition than file"),
        "data.test_size": (data.test_per_category == 0, "data.test_per_category = 0"),
        "strategy.kept_steps": (
            bool(recipe.strategy.kept) or "flex" in methods,
            "strategy.kept, or flex in strategy.name",
        ),
        "strategy.arrival_rounds": (data.arriving > 0, "data.arriving above 0"),
        "strategy.finetune_rounds": ("finetune" in methods, "finetune in strategy.name"),
        "strategy.ditto_lambda": ("ditto" in methods, "ditto in strategy.name"),
        "strategy.judged_below": ("orchard" in methods, "orchard in strategy.name"),
        "strategy.holdout": (
            "orchard" in methods and recipe.strategy.judged_below > 0,
            "orchard in strategy.name and strategy.judged_below above 0",
        ),
        "strategy.prox_mu": ("fedprox" in methods, "fedprox in strategy.name"),
        "strategy.entropy_coefficient": ("seermoe" in methods, "seermoe in strategy.name"),
        "server.trim": (
            recipe.server.aggregation in ("trimmed_mean", "krum"),
            "server.aggregation = trimmed_mean or krum",
        ),
        "server.clip": (
            recipe.server.aggregation == "clipped_mean",
            "server.aggregation = clipped_mean",
        ),
        "server.momentum": ("fedavgm" in methods, "fedavgm in strategy.name"),
        "server.dampening": ("fedavgm" in methods, "fedavgm in strategy.name"),
        "server.beta1": (adaptive, "fedadam or fedyogi in strategy.name"),
        "server.beta2": (adaptive, "fedadam or fedyogi in strategy.name"),
        "server.tau": (
            adaptive or "fedadagrad" in methods,
            "fedadagrad, fedadam or fedyogi in strategy.name",
        ),
        "evaluation.shots_path": (recipe.evaluation.shots > 0, "evaluation.shots above 0"),
        "evaluation.length_normalization": (
            "accuracy" in recipe.evaluation.metrics,
            "accuracy in evaluation.metrics",
        ),
        "communication.feedback": (
            recipe.communication.dtype == "int8"
            or recipe.communication.top_k > 0
            or ("scaffold" in methods and recipe.communication.dtype == "bfloat16"),
            "communication.dtype = int8 or communication.top_k above 0",
        ),
        **{
            f"privacy.{name}": (
                bool(recipe.privacy.unit),
                "privacy.unit = client or example",
            )
            for name in vars(recipe.privacy)
            if name != "unit" and not name.startswith("secure_")
        },
        **{
            f"privacy.{name}": (
                recipe.privacy.secure_aggregation,
                "privacy.secure_aggregation = true",
            )
            for name in ("secure_least", "secure_neighbors", "secure_bound")
        },
        "model.expert_cache": (
            recipe.model.placement != "memory",
            "model.placement = mapped or offload",
        ),
        "client.lr_min": (recipe.client.schedule == "cosine", "client.schedule = cosine"),
        **_needs_of_budgets(recipe, methods),
    }
    for key in keys:
        is_used, need = needs.get(key, (True, ""))
        if key.startswith(("strategy.graft_", "strategy.calibration")):
            is_used, need = grafts, "flex or orchard in strategy.name"
        if key == "strategy.graft_mix" and grafts:
            is_used, need = "flex" in methods, "flex in strategy.name: orchard is a difference"
        if grafts and key in _GRAFT_LORA:
            is_used, need = is_lora, "strategy.graft_kind = lora"
        if grafts and key in _GRAFT_SEARCH:
            is_used = recipe.strategy.graft_choice == "reconstruction"
            need = "strategy.graft_choice = reconstruction"
        if grafts and is_used and key in ("strategy.graft_budget", "strategy.graft_max_sets"):
            is_used, need = recipe.strategy.graft_experts > 1, "strategy.graft_experts above 1"
        # What a method of one's own reads is not known here.
        if not is_used and not (has_own and "strategy.name" in need):
            raise ValueError(f"{key} must come with {need} to have an effect; drop it or add that")


def _needs_of_budgets(recipe: Recipe, methods: Sequence[str]) -> dict[str, Need]:
    """Return what the options of budgets and of the choice of experts need."""
    selection, hfedmoe = recipe.selection, "hfedmoe" in methods
    subset = bool({*_SUBSETS} & {*methods})
    has_budget = subset or "fedavg_dropout" in methods
    names = ", ".join(_SUBSETS)
    of_budgets = (has_budget, f"{names} or fedavg_dropout in strategy.name")
    is_scored = selection.cadence in ("round", "run")
    needs: dict[str, Need] = {
        "client.budget": of_budgets,
        "client.memory_bytes": of_budgets,
        "selection.mode": (subset, f"one of {names} in strategy.name"),
        "selection.scoring_batches": (
            (subset and not hfedmoe) or (hfedmoe and is_scored),
            "selection.cadence = round or run" if hfedmoe else f"one of {names} in strategy.name",
        ),
    }
    # The other methods rank by what they are named for, and are not asked how.
    needs |= {
        f"selection.{name}": (hfedmoe, "hfedmoe in strategy.name")
        for name in vars(selection)
        if f"selection.{name}" not in needs
    }
    if hfedmoe:
        needs["selection.every"] = (selection.cadence == "steps", "selection.cadence = steps")
        ranks = selection.rank_by == "information"
        needs["selection.beta"] = (ranks, "selection.rank_by = information")
    return needs
