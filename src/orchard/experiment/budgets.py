"""How many experts each client can afford or graft, found before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from orchard.client.requirements import Requirements, TrainingShape
from orchard.experiment.methods import METHODS, check_strategy, has_grafts, has_part
from orchard.experiment.settings import graft_settings, lora_settings, placement_of
from orchard.experts.allocation import allocate
from orchard.experts.grafting import GraftSettings
from orchard.models.stored.tensors import open_checkpoint
from orchard.models.trainable.targets import ALL, EXPERTS
from orchard.models.view.moe import MoELayer, MoEView
from orchard.recipe.amounts import parse_amounts
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.seeding import Seeds

_DROPOUT = "fedavg_dropout"


@dataclass(frozen=True)
class Limit:
    """What one client can afford.

    Attributes:
        budget: Experts over all MoE layers; None = no limit; 0 where it cannot take part.
        memory_bytes: What ``client.memory_bytes`` gives it; None where the budget says it.
        reason: Why it cannot take part; empty where it can.
    """

    budget: int | None
    memory_bytes: int | None = None
    reason: str = ""


def expert_budgets(recipe: Recipe, view: MoEView, *, num_clients: int) -> tuple[int | None, ...]:
    """Return the budget of every client in order, in experts over all MoE layers; None = no limit.

    Args:
        recipe: Says ``client.budget`` or ``client.memory_bytes``.
        view: The model, which may be on the meta device.
        num_clients: Clients of the federation.

    Raises:
        ValueError: A budget cannot be read, is too small to train on, or the method cannot use it.
    """
    limits = client_limits(recipe, view, num_clients=num_clients)
    # There a client that affords nothing drops out, as one does that affords a part.
    if _DROPOUT not in check_strategy(recipe.strategy.name):
        for limit in limits:
            if limit.reason:
                raise ValueError(limit.reason)
    return tuple(limit.budget for limit in limits)


def client_limits(recipe: Recipe, view: MoEView, *, num_clients: int) -> tuple[Limit, ...]:
    """Return what every client can afford, in order, those that cannot take part included.

    Args:
        recipe: Says ``client.budget`` or ``client.memory_bytes``.
        view: The model, which may be on the meta device.
        num_clients: Clients of the federation.

    Raises:
        ValueError: A budget cannot be read, or the method cannot use it; or grafts do not fit, see
            ``check_grafts``.
    """
    methods = check_strategy(recipe.strategy.name)
    check_grafts(recipe, view)
    client = recipe.client
    if client.budget and client.memory_bytes:
        raise ValueError(
            "client.budget and client.memory_bytes must not both be given, got "
            f"{client.budget} and {client.memory_bytes}; a budget follows from the memory"
        )
    key = "client.budget" if client.budget else "client.memory_bytes"
    if not has_part(methods, "budget"):
        if client.budget or client.memory_bytes:
            able = [name for name, method in METHODS.items() if method.part == "budget"]
            raise ValueError(
                f"{key} must be empty with strategy.name = {recipe.strategy.name}, which trains "
                f"all experts; choose one of {', '.join(able)}"
            )
        return (Limit(None),) * num_clients
    trained = {*words(recipe.model.lora_targets), *words(recipe.model.full_targets)}
    if not trained & {EXPERTS, ALL}:
        raise ValueError(
            f"model.lora_targets or model.full_targets must name {EXPERTS} with strategy.name = "
            f"{recipe.strategy.name}, got {', '.join(sorted(trained))}; it chooses among experts"
        )
    check_selection(recipe, view)
    generator = Seeds(recipe.seed).generator("budgets")
    if client.memory_bytes:
        caps = parse_amounts(
            client.memory_bytes,
            name=key,
            num_clients=num_clients,
            generator=generator,
            kind="bytes",
        )
        requirements = build_requirements(recipe, view)
        return tuple(
            _afford(cap, f"client {number}", requirements)
            for number, cap in enumerate(caps, start=1)
        )
    if not client.budget:
        return (Limit(None),) * num_clients
    num_experts = sum(layer.num_experts for layer in view.layers)
    amounts = parse_amounts(
        client.budget, name=key, num_clients=num_clients, generator=generator, kind="experts"
    )
    budgets = [amount.resolve(num_experts, name=key) for amount in amounts]
    return tuple(
        _counted(budget, f"client {number}", view) for number, budget in enumerate(budgets, start=1)
    )


def _counted(budget: int, who: str, view: MoEView) -> Limit:
    num_layers = len(view.layers)
    num_experts = sum(layer.num_experts for layer in view.layers)
    if budget >= num_layers:
        return Limit(budget)
    return Limit(
        0,
        reason=f"client.budget must afford one expert in each of the {num_layers} MoE layers, got "
        f"{budget} of {num_experts} experts for {who}; the smallest that works is {num_layers}, or "
        f"{100 * num_layers / num_experts:.3g}%",
    )


def _afford(cap: int, who: str, requirements: Requirements) -> Limit:
    """Return the most experts whose predicted peak is within ``cap`` bytes."""
    sizes = requirements.footprint.layers.values()
    low, high = len(sizes), sum(sizes)
    smallest = requirements.peak(low)
    if smallest.total > cap:
        dense = smallest.process + requirements.footprint.dense_bytes
        below = (
            f"{_show(dense - cap)} below the dense part of the model alone"
            if cap < dense
            else f"{_show(smallest.total - cap)} too little"
        )
        return Limit(
            0,
            cap,
            "client.memory_bytes must hold training with one expert in each of the "
            f"{low} MoE layers, {_show(smallest.total)}, got {_show(cap)} for {who}, {below}; "
            "raise it, or lower client.batch_size or data.max_tokens",
        )
    while low < high:
        middle = (low + high + 1) // 2
        if requirements.peak(middle).total <= cap:
            low = middle
        else:
            high = middle - 1
    return Limit(low, cap)


def _show(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"


def build_requirements(recipe: Recipe, view: MoEView) -> Requirements:
    """Return what training by a recipe needs in memory, with more or fewer experts.

    Args:
        recipe: Says how.
        view: The model, which may be on the meta device.

    Raises:
        ValueError: The checkpoint's headers cannot be read.
    """
    methods = check_strategy(recipe.strategy.name)
    selection, client = recipe.selection, recipe.client
    chooses = has_part(methods, "budget") and _DROPOUT not in methods
    num_choices = 1
    if "hfedmoe" in methods and selection.cadence in ("batch", "steps"):
        # By epochs there are as many as the data has batches: all experts may get their turn.
        every = selection.every if selection.cadence == "steps" else 1
        num_choices = -(-client.steps // every) if client.steps else 1_000_000
    shape = TrainingShape(
        lora=lora_settings(recipe),
        dtype=recipe.model.dtype,
        batch_size=client.batch_size,
        num_tokens=recipe.data.max_tokens,
        optimizer=client.optimizer,
        is_carved=chooses and selection.mode == "carve",
        num_choices=num_choices,
        personal=_personal(recipe, view) if has_grafts(methods) else 0,
        placement=placement_of(recipe),
    )
    stored_bytes = open_checkpoint(recipe.model.path).num_bytes
    return Requirements(view.model.config, shape, stored_bytes=stored_bytes)


def _personal(recipe: Recipe, view: MoEView) -> int:
    """Return the most elements that a client's grafts may have."""
    graft, strategy = graft_settings(recipe), recipe.strategy
    sizes = [strategy.graft_experts]
    if strategy.graft_budget:
        sizes = list(range(1, strategy.graft_experts + 1))
    elements = [
        {number: graft_elements(layer, graft, number=number) for number in sizes}
        for layer in view.layers
    ]
    # Data decides which layers get how many: the largest sum is the smallest of the negatives.
    budget = strategy.graft_budget or len(elements) * strategy.graft_experts
    numbers = allocate([{n: -e for n, e in own.items()} for own in elements], budget=budget)
    return sum(own[number] for own, number in zip(elements, numbers, strict=True))


def graft_elements(layer: MoELayer, settings: GraftSettings, *, number: int = 1) -> int:
    """Return the trainable elements of a layer's grafts, their router and their gate.

    Args:
        layer: Where they are grafted.
        settings: What they are made of.
        number: How many; one has no router.
    """
    tensors = layer.expert_tensors(0)
    if settings.kind == "dense":
        own = sum(tensor.numel() for tensor in tensors.values())
    else:
        # A factor of rank rows for the input and one of rank columns for the output.
        own = settings.rank * sum(sum(t.shape) for t in tensors.values() if t.ndim == 2)
    gate = {"none": 0, "router_row": layer.width, "closed": layer.width + 1}[settings.gate]
    if number == 1:
        return own + gate
    row = layer.width + ("bias" in layer.router_tensors())
    # Beside a router, grafts that start by its rows have no other gate.
    return number * (own + row) + (gate if settings.gate == "closed" else 0)


def check_selection(recipe: Recipe, view: MoEView) -> None:
    """Check the options of ``selection`` against a model.

    Raises:
        ValueError: No usage can reach the threshold, or two options do not go together.
    """
    selection, methods = recipe.selection, check_strategy(recipe.strategy.name)
    if selection.mode == "carve" and recipe.client.router_aux_coefficient > 0:
        raise ValueError(
            "client.router_aux_coefficient must be 0 with selection.mode = carve, got "
            f"{recipe.client.router_aux_coefficient}; a model's balancing loss counts all experts"
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
    if not has_grafts(check_strategy(recipe.strategy.name)):
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
