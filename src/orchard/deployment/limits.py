"""How much of a site's machine a recipe may ask for, option by option."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from orchard.communication.refusals import Code
from orchard.deployment.consent import Refusal
from orchard.recipe.options import Recipe
from orchard.recipe.reading import known_options, option_value

CLIENTS = "clients"
LIMITS: Mapping[str, float] = {
    "model.num_threads": max(os.cpu_count() or 1, 64),
    "model.lora_rank": 512,
    "data.max_tokens": 16_384,
    "strategy.graft_rank": 512,
    "strategy.graft_experts": 64,
    "strategy.graft_budget": 4096,
    "strategy.graft_max_sets": 1_000_000,
    "strategy.calibration_blocks": 4096,
    "strategy.calibration_tokens": 16_384,
    "selection.scoring_batches": 1024,
    "client.steps": 10_000,
    "client.epochs": 100,
    "client.batch_size": 512,
    "client.grad_accumulation": 1024,
    "client.pass_tokens": 131_072,
    "client.lr": 100.0,
    "server.rounds": 10_000,
    "server.keep_rounds": 100,
    "evaluation.batch_size": 1024,
    "evaluation.max_new_tokens": 4096,
    CLIENTS: 10_000,
}
"""Largest value of an option that a site does without being told otherwise; ``clients`` is how
many sites a federation may say that it has. Far above what recipes ask for: an owner lowers them to
what the machine is to give."""


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """Read limits from the command line, as ``client.steps=100``.

    Raises:
        ValueError: One is none, or not of an option that is a number.
    """
    known = known_options()
    limits = {}
    for text in texts:
        key, equals, value = text.partition("=")
        is_number = key == CLIENTS or (key in known and known[key][0] in (int, float))
        if not equals or not is_number:
            raise ValueError(
                f"--limit must be OPTION=NUMBER of an option that is a number, got {text}; for "
                "example client.steps=100"
            )
        try:
            limits[key] = float(value)
        except ValueError:
            limits[key] = -1.0
        if not 0 <= limits[key] < float("inf"):
            raise ValueError(
                f"--limit must give a number of at least 0 for {key}, got {value}; for example "
                "client.steps=100"
            )
    return limits


def check_limits(recipe: Recipe, own: Mapping[str, float], *, num_clients: int = 1) -> None:
    """Refuse a recipe that asks for more of an option than the owner gives.

    Args:
        recipe: With the site's own data section.
        own: The owner's limits, which win over ``LIMITS``.
        num_clients: Sites of the federation, as the coordinator says.

    Raises:
        Refusal: An option is above its limit.
    """
    for key, limit in {**LIMITS, **own}.items():
        value = num_clients if key == CLIENTS else option_value(recipe, key)
        assert isinstance(value, int | float)
        if value > limit:
            raise Refusal(
                Code.LIMIT,
                f"{key} must be at most {limit:g} at this site, got {value}; its owner raises it "
                f"with --limit {key}={value}",
                option=key,
            )
