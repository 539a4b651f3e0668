"""What a recipe asks of each client, before any weight is loaded.

From the model's configuration, the headers of its files and the sizes of the data. A count of
bytes or experts that depends on what the data will use is the most that it can be.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.markup import escape
from rich.table import Table

from orchard.client.requirements import PeakMemory, Requirements
from orchard.communication.stages import message_bytes
from orchard.experiment.budgets import Limit, build_requirements, client_limits
from orchard.experiment.checking import (
    check_carving,
    check_clients,
    check_cohort,
    check_names,
    check_pair,
    check_tested,
)
from orchard.experiment.encoding import end_ids, make_wording
from orchard.experiment.holdings import Federation, build_federation, read_elsewhere
from orchard.experiment.methods import build_strategy, check_strategy, has_part, require_path
from orchard.experiment.placements import (
    PlacementPlan,
    find_free,
    placements_as_rows,
    plan_placements,
)
from orchard.experiment.preparation import encode_holdings
from orchard.experiment.settings import learning_rate, lora_settings
from orchard.experiment.start_values import check_start
from orchard.experiment.wiring import build_channel, check_communication
from orchard.models.stored.endings import unknown_ends
from orchard.models.stored.loading import check_checkpoint, check_vocabulary, load_tokenizer
from orchard.recipe.options import Recipe


@dataclass(frozen=True)
class ClientPlan:
    """What one client would do.

    Attributes:
        client_id: Who.
        num_examples: For training.
        limit: What it can afford.
        budget: Experts that it trains, over all MoE layers.
        trainable: Parameters that it trains, at most, personal ones included.
        peak: Predicted memory in a process of its own; None where it cannot take part.
        uplink_bytes: Sent in a round, at most.
        downlink_bytes: Received in a round; in the first, where later ones bring differences.
    """

    client_id: str
    num_examples: int
    limit: Limit
    budget: int
    trainable: int
    peak: PeakMemory | None
    uplink_bytes: int
    downlink_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a recipe asks of all clients.

    Attributes:
        num_layers: MoE layers.
        num_experts: Over all of them.
        clients: In the order of the data.
        notes: What a person should know about the data and the base.
        learning_rate: Of the first round.
        mapped_bytes: Of the weights, what is mapped from disk and shared between processes.
        placements: What the largest client needs with its frozen experts elsewhere; empty where
            clients hold some experts alone.
        free_bytes: Of memory, now; None where the system does not say.
    """

    num_layers: int
    num_experts: int
    clients: tuple[ClientPlan, ...]
    notes: tuple[str, ...] = ()
    learning_rate: float = 0.0
    mapped_bytes: int = 0
    placements: tuple[PlacementPlan, ...] = ()
    free_bytes: int | None = None


def make_plan(
    recipe: Recipe, *, federation: Federation | None = None, encodes: bool = True
) -> Plan:
    """Compute what every client of a recipe needs.

    Args:
        recipe: Every choice.
        federation: Its data; None = it is read as the recipe says.
        encodes: Whether what would be refused of that data as tokens is looked for.

    Raises:
        FileNotFoundError: Data or model are not there.
        ValueError: Something does not fit.
    """
    methods = check_strategy(recipe.strategy.name)
    is_whole = federation is None
    if federation is None:
        require_path(recipe)
        check_communication(recipe)
        federation = build_federation(recipe)
    build_strategy(recipe, num_clients=len(federation.train))  # what cannot be put on is refused
    elsewhere = read_elsewhere(recipe)
    if is_whole:  # of one client in a federation elsewhere, less is known
        check_clients(recipe, federation)
        check_cohort(recipe, num_clients=len(federation.train))
    check_tested(recipe, federation, elsewhere)
    path = recipe.model.path
    checked = check_checkpoint(path, lora_settings(recipe))
    check_names(recipe)
    check_pair(recipe, checked.view)
    if is_whole:
        check_start(recipe)
    tokenizer = load_tokenizer(path)
    unknown = check_vocabulary(tokenizer, checked.vocabulary, path=path)
    wording = make_wording(recipe, tokenizer)
    if is_whole and encodes:
        rows = checked.vocabulary if unknown else None
        encode_holdings(recipe, federation, elsewhere, wording, rows=rows)
    ends = end_ids(recipe, wording)  # what cannot be worded is refused, too
    beyond = unknown_ends(ends, checked.vocabulary, path=path)
    view = checked.view
    limits = client_limits(recipe, view, num_clients=len(federation.train))
    check_carving(recipe, view, [limit.budget for limit in limits])
    requirements = build_requirements(recipe, view)
    num_experts = requirements.footprint.num_experts
    clients = []
    for (client_id, examples), limit in zip(federation.train.items(), limits, strict=True):
        budget = num_experts if limit.budget is None else limit.budget
        if "fedavg_dropout" in methods and budget < num_experts:
            limit = Limit(0, limit.memory_bytes, limit.reason or "it drops out: not all experts")
            budget = 0
        takes_part = not limit.reason
        clients.append(
            ClientPlan(
                client_id=client_id,
                num_examples=len(examples),
                limit=limit,
                budget=budget,
                trainable=_trainable(requirements, budget) if takes_part else 0,
                peak=requirements.peak(budget) if takes_part else None,
                uplink_bytes=_uplink(recipe, requirements, budget) if takes_part else 0,
                downlink_bytes=_downlink(recipe, requirements) if takes_part else 0,
            )
        )
    base_notes = (*checked.notes, *(note for note in (unknown, beyond) if note))
    notes = (*federation.notes(), *elsewhere.remarks, *base_notes)
    layers, rate = len(requirements.footprint.layers), learning_rate(recipe, view)
    mapped = recipe.model.placement == "mapped"
    sizes = requirements.footprint
    mapped_bytes = sum(
        size * number
        for size, number in zip(sizes.expert_bytes.values(), sizes.layers.values(), strict=True)
    )
    largest = max((c.budget for c in clients if c.peak is not None), default=0)
    free = find_free(recipe.model.device)
    placements: tuple[PlacementPlan, ...] = ()
    if largest and not requirements.is_carved:
        placements = plan_placements(
            requirements,
            lora_settings(recipe),
            budget=largest,
            device=recipe.model.device,
            free=free,
        )
    return Plan(
        layers,
        num_experts,
        tuple(clients),
        notes,
        rate,
        mapped_bytes if mapped else 0,
        placements,
        free.host,
    )


def _trainable(requirements: Requirements, budget: int) -> int:
    elements = requirements.trainable(requirements.spread(budget))
    return elements + requirements.personal


def _downlink(recipe: Recipe, requirements: Requirements) -> int:
    """Return the bytes of the global tree, which every client gets whole."""
    methods = check_strategy(recipe.strategy.name)
    if has_part(methods, "sharing"):
        return 0
    return _message(recipe, requirements, requirements.footprint.num_experts, is_update=False)


def _uplink(recipe: Recipe, requirements: Requirements, budget: int) -> int:
    """Return the bytes of the names that a client can send at most."""
    methods = check_strategy(recipe.strategy.name)
    if has_part(methods, "sharing"):
        return 0
    chooses = has_part(methods, "budget")
    # A client that holds every expert may also send those that it did not train.
    sends_others = "fedavg_random" in methods or (
        "hfedmoe" in methods
        and recipe.selection.mode == "mask"
        and not recipe.selection.require_trained
    )
    experts = requirements.footprint.num_experts if not chooses or sends_others else budget
    return _message(recipe, requirements, experts, is_update=True)


def _message(recipe: Recipe, requirements: Requirements, experts: int, *, is_update: bool) -> int:
    sizes, channel = requirements.footprint, build_channel(recipe)
    spread = requirements.spread(experts)
    share = requirements.trainable(spread) / requirements.trainable(tuple(sizes.layers.values()))
    stages = channel.uplink if is_update else channel.downlink
    whole = message_bytes(sizes.trainable, stages, has_weights=is_update)
    methods = check_strategy(recipe.strategy.name)
    # A control variate is as large as what it corrects.
    copies = 2 if has_part(methods, "control") else 1
    return round(copies * share * whole)


def plan_table(plan: Plan) -> Table:
    """Return a plan for people."""
    title = (
        f"{plan.num_experts} experts in {plan.num_layers} MoE layers, "
        f"learning rate {plan.learning_rate:g}"
    )
    table = Table("client", title=title, title_justify="left")
    for name in ("examples", "memory", "experts", "trainable", "predicted peak", "up", "down"):
        table.add_column(name, justify="right")
    for client in plan.clients:
        cap = client.limit.memory_bytes
        cells = (
            str(client.num_examples),
            _size(cap) if cap is not None else "",
            f"{client.budget} of {plan.num_experts}" if client.peak else "none",
            f"{client.trainable:,}" if client.peak else "",
            _size(client.peak.total) if client.peak else "",
            f"<= {_size(client.uplink_bytes)}" if client.peak else "",
            _size(client.downlink_bytes) if client.peak else "",
        )
        table.add_row(escape(client.client_id), *cells)
    return table


def plan_sentences(plan: Plan) -> list[str]:
    """Return who cannot take part, and why, and what is to be known of the data and the base."""
    return [
        f"{client.client_id} cannot take part: {client.limit.reason}"
        for client in plan.clients
        if client.limit.reason
    ] + list(plan.notes)


def plan_as_json(plan: Plan) -> str:
    """Return a plan for programs."""
    clients = []
    for client in plan.clients:
        peak = client.peak
        clients.append(
            {
                "client": client.client_id,
                "examples": client.num_examples,
                "memory_bytes": client.limit.memory_bytes,
                "takes_part": peak is not None,
                "reason": client.limit.reason,
                "experts": client.budget,
                "trainable_parameters": client.trainable,
                "predicted_peak_bytes": peak.total if peak else None,
                "predicted_anonymous_bytes": peak.anonymous if peak else None,
                "predicted_parts_bytes": asdict(peak) if peak else None,
                "uplink_bytes_at_most": client.uplink_bytes,
                "downlink_bytes": client.downlink_bytes,
            }
        )
    about = {
        "moe_layers": plan.num_layers,
        "experts": plan.num_experts,
        "learning_rate": plan.learning_rate,
        "clients": clients,
        "placements": placements_as_rows(plan.placements),
        "free_bytes": plan.free_bytes,
        "notes": list(plan.notes),
    }
    return json.dumps(about, indent=1)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
