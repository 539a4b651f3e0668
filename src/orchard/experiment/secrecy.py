"""Secure aggregation asked for by a recipe becomes what a round does, or is refused."""

from __future__ import annotations

from collections.abc import Mapping

from orchard.engine.secrecy import Secrecy
from orchard.experiment.methods import check_strategy, find_method, own_names
from orchard.extras import require
from orchard.recipe.options import Recipe

_UNSOUND: Mapping[str, str] = {
    "sharing": "nothing is sent that could be summed",
}


def check_secrecy(recipe: Recipe, sizes: Mapping[str, int]) -> None:
    """Refuse a secure sum that could not be computed, or would show what it hides.

    Args:
        recipe: Every choice.
        sizes: Client id to its training examples.

    Raises:
        ValueError: It could not, or it would.
    """
    privacy = recipe.privacy
    if not privacy.secure_aggregation:
        return
    require("secure", to="aggregate in secret")
    with_it = "with privacy.secure_aggregation"
    named = recipe.strategy.name
    for name in check_strategy(named):
        if name in own_names(named):
            raise ValueError(
                f"strategy.name must be of Orchard's own methods {with_it}, got {name}; whether "
                "another needs single updates, and how much one counts, is not known"
            )
        if why := _UNSOUND.get(find_method(name).part):
            raise ValueError(f"strategy.name must not hold {name} {with_it}, got {named}; {why}")
        if name == "hfedmoe" and recipe.selection.router != "examples":
            raise ValueError(
                f"selection.router must be examples {with_it}, got "
                f"{recipe.selection.router}; how much a client prefers its experts has no "
                "bound that could be agreed on before"
            )
    for key, wanted, given, why in (
        ("server.aggregation", "mean", recipe.server.aggregation, "it looks at single updates"),
        ("communication.top_k", 0.0, recipe.communication.top_k, "every value is sent, masked"),
    ):
        if given != wanted:
            raise ValueError(f"{key} must be {wanted} {with_it}, got {given}; {why}")
    if recipe.communication.dtype == "int8":
        raise ValueError(
            f"communication.dtype must be float32 or bfloat16 {with_it}, got int8; values are sent "
            "as masked whole numbers of 32 bits"
        )
    if privacy.unit == "client":
        raise ValueError(
            f"privacy.unit must be empty or example {with_it}, got client; the server would clip "
            "single updates"
        )
    size = recipe.server.clients_per_round or len(sizes)
    if size < privacy.secure_least:
        raise ValueError(
            f"server.clients_per_round must be at least privacy.secure_least = "
            f"{privacy.secure_least}, got {size}; the sum of so few would show what one of them "
            "sent"
        )


def build_secrecy(recipe: Recipe, sizes: Mapping[str, int]) -> Secrecy | None:
    """Return how sums are kept secret; None where they are not."""
    privacy = recipe.privacy
    if not privacy.secure_aggregation:
        return None
    is_uniform = recipe.server.weighting == "uniform"
    return Secrecy(
        least=privacy.secure_least,
        bound=privacy.secure_bound,
        max_weight=1.0 if is_uniform else float(max(sizes.values())),
    )


def secrecy_facts(recipe: Recipe) -> dict[str, object]:
    """Return what ``result.json`` says of secure sums; nothing where there are none."""
    privacy = recipe.privacy
    if not privacy.secure_aggregation:
        return {}
    return {"secure_aggregation": {"least": privacy.secure_least, "bound": privacy.secure_bound}}
