"""Secure aggregation asked for by a recipe becomes what a round does, or is refused."""

from __future__ import annotations

from collections.abc import Mapping

from orchard.communication.sum_messages import MAX_MEMBERS
from orchard.engine.secrecy import Secrecy
from orchard.experiment.methods import check_strategy, find_method, own_names
from orchard.experiment.settings import check_wanted
from orchard.extras import require
from orchard.recipe.options import Recipe

_OPTION = "privacy.secure_aggregation"
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
    if recipe.privacy.secure_aggregation:
        _check_recipe(recipe)
        _check_size(recipe, recipe.server.clients_per_round or len(sizes))


def check_deployed_secrecy(recipe: Recipe, *, num_sites: int = 0) -> None:
    """Refuse a secure sum between sites that could not be computed, or would show what it hides.

    Args:
        recipe: Every choice.
        num_sites: Sites of the federation; 0 = that is not known yet.

    Raises:
        ValueError: It could not, or it would.
    """
    if not recipe.privacy.secure_aggregation:
        return
    _check_recipe(recipe)
    own = recipe.deployment
    wanted = (
        ("deployment.max_update_norm", 0.0, own.max_update_norm, "nobody sees an update's norm"),
        ("deployment.stragglers", "drop", own.stragglers, "a late update is in no sum"),
        (
            "deployment.weights",
            "examples",
            own.weights,
            "sites weigh their own updates; server.weighting = uniform lets all weigh the same",
        ),
    )
    check_wanted(wanted, beside=_OPTION)
    if size := recipe.server.clients_per_round or num_sites:
        _check_size(recipe, size)
        if size > MAX_MEMBERS:
            raise ValueError(
                f"server.clients_per_round must be at most {MAX_MEMBERS} between sites with "
                f"privacy.secure_aggregation, got {size}; what is said of all of them must fit one "
                "message"
            )


def _check_recipe(recipe: Recipe) -> None:
    privacy = recipe.privacy
    require("secure", to="aggregate in secret")
    with_it = f"with {_OPTION}"
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
    wanted = (
        ("server.aggregation", "mean", recipe.server.aggregation, "it looks at single updates"),
        ("communication.top_k", 0.0, recipe.communication.top_k, "every value is sent, masked"),
    )
    check_wanted(wanted, beside=_OPTION)
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
    number = privacy.secure_neighbors
    if number and (number % 2 or number < max(2, privacy.secure_least - 1)):
        raise ValueError(
            "privacy.secure_neighbors must be 0 or an even number of at least "
            f"{max(2, privacy.secure_least - 1)}, got {number}; a client hides among them"
        )


def _check_size(recipe: Recipe, size: int) -> None:
    privacy = recipe.privacy
    if size < privacy.secure_least:
        raise ValueError(
            f"server.clients_per_round must be at least privacy.secure_least = "
            f"{privacy.secure_least}, got {size}; the sum of so few would show what one of them "
            "sent"
        )


def build_secrecy(recipe: Recipe, sizes: Mapping[str, int]) -> Secrecy | None:
    """Return how sums are kept secret; None where they are not.

    Without any sizes, which are known once sites have joined, the largest weight is 0.
    """
    privacy = recipe.privacy
    if not privacy.secure_aggregation:
        return None
    is_uniform = recipe.server.weighting == "uniform"
    return Secrecy(
        least=privacy.secure_least,
        bound=privacy.secure_bound,
        max_weight=1.0 if is_uniform else float(max(sizes.values(), default=0)),
        num_neighbors=privacy.secure_neighbors,
    )


def secrecy_facts(recipe: Recipe) -> dict[str, object]:
    """Return what ``result.json`` says of secure sums; nothing where there are none."""
    privacy = recipe.privacy
    if not privacy.secure_aggregation:
        return {}
    facts = {
        "least": privacy.secure_least,
        "bound": privacy.secure_bound,
        "neighbors": privacy.secure_neighbors,
    }
    return {"secure_aggregation": facts}
