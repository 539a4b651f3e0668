"""How many experts each client can afford or graft, checked before any model is loaded."""

from __future__ import annotations

from orchard.methods import METHODS, check_strategy
from orchard.models.moe import MoEView
from orchard.models.targets import ALL, EXPERTS
from orchard.recipe.amounts import parse_amounts
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.seeding import Seeds


def expert_budgets(recipe: Recipe, view: MoEView, *, num_clients: int) -> tuple[int | None, ...]:
    """Return the budget of every client in order, in experts over all MoE layers; None = no limit.

    Args:
        recipe: Says ``client.budget`` or ``client.memory_bytes``.
        view: The model, which may be on the meta device.
        num_clients: Clients of the federation.

    Raises:
        ValueError: A budget cannot be read, is too small to train on, or the method cannot use it.
    """
    methods = check_strategy(recipe.strategy.name)
    budget_methods = [name for name in methods if METHODS[name].part == "budget"]
    client = recipe.client
    if client.budget and client.memory_bytes:
        raise ValueError(
            "client.budget and client.memory_bytes must not both be given, got "
            f"{client.budget} and {client.memory_bytes}; a budget follows from the memory"
        )
    key = "client.budget" if client.budget else "client.memory_bytes"
    if not budget_methods:
        if client.budget or client.memory_bytes:
            able = [name for name, method in METHODS.items() if method.part == "budget"]
            raise ValueError(
                f"{key} must be empty with strategy.name = {recipe.strategy.name}, which trains "
                f"all experts; choose one of {', '.join(able)}"
            )
        return (None,) * num_clients
    trained = {*words(recipe.model.lora_targets), *words(recipe.model.full_targets)}
    if not trained & {EXPERTS, ALL}:
        raise ValueError(
            f"model.lora_targets or model.full_targets must name {EXPERTS} with strategy.name = "
            f"{recipe.strategy.name}, got {', '.join(sorted(trained))}; it chooses among experts"
        )
    check_selection(recipe, view)
    if not (client.budget or client.memory_bytes):
        return (None,) * num_clients
    generator = Seeds(recipe.seed).generator("budgets")
    num_experts = sum(layer.num_experts for layer in view.layers)
    if client.memory_bytes:
        raise NotImplementedError
    amounts = parse_amounts(
        client.budget, name=key, num_clients=num_clients, generator=generator, kind="experts"
    )
    budgets = [amount.resolve(num_experts, name=key) for amount in amounts]
    num_layers = len(view.layers)
    for position, budget in enumerate(budgets):
        if budget < num_layers:
            raise ValueError(
                f"{key} must afford one expert in each of the {num_layers} MoE layers, got "
                f"{budget} of {num_experts} experts for client {position + 1}; the smallest that "
                f"works is {num_layers}, or {100 * num_layers / num_experts:.3g}%"
            )
    return tuple(budgets)


def check_selection(recipe: Recipe, view: MoEView) -> None:
    """Check the options of ``selection`` against a model.

    Raises:
        ValueError: No usage can reach the threshold, or two options do not go together.
    """
    selection, methods = recipe.selection, check_strategy(recipe.strategy.name)
    if selection.mode == "carve" and "flex" in methods:
        raise ValueError(
            f"selection.mode must be mask with strategy.name = {recipe.strategy.name}, got carve; "
            "grafts are on a whole model"
        )
    if "hfedmoe" not in methods:
        return  # the others decide for themselves what these options say
    smallest = min(layer.num_experts for layer in view.layers)
    if selection.threshold > smallest:
        raise ValueError(
            f"selection.threshold must be at most {smallest}, got {selection.threshold}; it is in "
            f"units of 1/{smallest}, and no usage is above 1: no expert would ever be sent"
        )
    if selection.mode == "carve" and selection.rank_by == "none":
        raise ValueError(
            "selection.rank_by must choose with selection.mode = carve, got none; "
            "take mode = mask to train all experts"
        )
    if selection.mode == "carve" and selection.cadence in ("batch", "steps"):
        raise ValueError(
            f"selection.cadence must be round or run with selection.mode = carve, got "
            f"{selection.cadence}; experts are loaded once a round"
        )


def check_grafts(recipe: Recipe, view: MoEView) -> None:
    """Check how many experts are to be grafted against a model, which may be on the meta device.

    Raises:
        ValueError: A layer has fewer experts, or the budget fits no number of grafts per layer.
    """
    if "flex" not in check_strategy(recipe.strategy.name):
        return
    number, budget = recipe.strategy.graft_experts, recipe.strategy.graft_budget
    smallest = min(layer.num_experts for layer in view.layers)
    if number > smallest:
        raise ValueError(
            f"strategy.graft_experts must be in 1..{smallest}, got {number}; "
            "an MoE layer of this model has no more routed experts"
        )
    num_layers = len(view.layers)
    if budget and not num_layers <= budget <= num_layers * number:
        raise ValueError(
            f"strategy.graft_budget must be 0 or in {num_layers}..{num_layers * number}, got "
            f"{budget}; each of the {num_layers} MoE layers has at least one graft and at most "
            f"strategy.graft_experts = {number}"
        )
