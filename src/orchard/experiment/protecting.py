"""A privacy section becomes what is done to updates, or is refused where it would not hold."""

from __future__ import annotations

from functools import partial

from orchard.experiment.methods import check_strategy, find_method, own_names
from orchard.recipe.options import Recipe
from orchard.seeding import Seeds
from orchard.server.accounting import affordable_rounds, noise_for, spent
from orchard.server.privacy import Protection, seeded_noise, system_noise

# Parts of a method that send a fixed set of names and leave their sum to the server.
_SOUND = ("server", "objective", "experts", "private")
_WHY = {
    "budget": "which experts a client sends depends on its data, and says so",
    "control": "control variates are sums over clients beside the one that is protected",
    "last rounds": "its last rounds send nothing, and would have noise added all the same",
    "sharing": "nothing is sent that could be protected",
}


def check_privacy(recipe: Recipe, *, num_clients: int) -> None:
    """Refuse a protection that would not hold, or whose cost is not stated.

    Raises:
        ValueError: It would not, or it is not.
    """
    options = recipe.privacy
    if not options.unit:
        return
    for name in check_strategy(recipe.strategy.name):
        if name in own_names(recipe.strategy.name):
            raise ValueError(
                f"strategy.name must be of Orchard's own methods with privacy.unit, got {name}; "
                "what another sends is not known to be bounded"
            )
        part = "last rounds" if name == "finetune" else find_method(name).part
        if part not in _SOUND:
            raise ValueError(
                f"strategy.name must not hold {name} with privacy.unit = {options.unit}, got "
                f"{recipe.strategy.name}; {_WHY[part]}"
            )
    if recipe.server.aggregation != "mean":
        raise ValueError(
            "server.aggregation must be mean with privacy.unit, got "
            f"{recipe.server.aggregation}; the noise is measured for a sum"
        )
    if recipe.server.weighting != "uniform":
        raise ValueError(
            "server.weighting must be uniform with privacy.unit, got "
            f"{recipe.server.weighting}; how many examples a client has would count for its bound"
        )
    if not options.epsilon and not options.noise:
        raise ValueError(
            "privacy.epsilon or privacy.noise must be given with privacy.unit, got neither; "
            "for example privacy.epsilon=8"
        )
    if options.delta * num_clients >= 1:
        raise ValueError(
            f"privacy.delta must be below 1 / {num_clients}, the number of clients, got "
            f"{options.delta:g}; a larger one lets one client be shown whole"
        )
    protection = build_protection(recipe, num_clients=num_clients)
    if protection is not None:
        _ = protection.sum_noise  # refuses a quantile that costs too much
    if private_rounds(recipe, num_clients=num_clients) == 0:
        raise ValueError(
            f"privacy.epsilon must pay for one round at least, got {options.epsilon:g} with noise "
            f"of {options.noise:g}; one costs "
            f"{_spent(recipe, noise=options.noise, num_clients=num_clients, rounds=1):.3g}"
        )


def build_protection(recipe: Recipe, *, num_clients: int) -> Protection | None:
    """Return what is done to updates; None where nothing is."""
    options = recipe.privacy
    if not options.unit:
        return None
    noise = _noise(recipe, num_clients=num_clients)
    return Protection(
        noise=noise,
        clip=options.clip,
        expected=_rate(recipe, num_clients) * num_clients,
        quantile=options.clip_quantile,
        draw=system_noise if options.random == "system" else seeded_noise(Seeds(recipe.seed)),
        spent=lambda rounds: _spent(recipe, noise=noise, num_clients=num_clients, rounds=rounds),
    )


def private_rounds(recipe: Recipe, *, num_clients: int) -> int:
    """Return how many of ``server.rounds`` the budget pays for."""
    options, rounds = recipe.privacy, recipe.server.rounds
    if not options.unit or not options.epsilon or not options.noise:
        return rounds  # no budget, or noise that was chosen for all of them
    return affordable_rounds(
        epsilon=options.epsilon,
        noise=options.noise,
        sampling_rate=_rate(recipe, num_clients),
        rounds=rounds,
        delta=options.delta,
    )


def privacy_facts(recipe: Recipe, *, num_clients: int, rounds: int) -> dict[str, object]:
    """Return what ``result.json`` says of privacy; nothing where there is none."""
    options = recipe.privacy
    if not options.unit:
        return {}
    noise = _noise(recipe, num_clients=num_clients)
    return {
        "privacy": {
            "unit": options.unit,
            "epsilon": _spent(recipe, noise=noise, num_clients=num_clients, rounds=rounds),
            "delta": options.delta,
            "noise": noise,
            "clip": options.clip,
            "clip_quantile": options.clip_quantile,
            "sampling_rate": _rate(recipe, num_clients),
            "random": options.random,
        }
    }


def _rate(recipe: Recipe, num_clients: int) -> float:
    return (recipe.server.clients_per_round or num_clients) / num_clients


def _noise(recipe: Recipe, *, num_clients: int) -> float:
    options = recipe.privacy
    return options.noise or noise_for(
        epsilon=options.epsilon,
        sampling_rate=_rate(recipe, num_clients),
        rounds=recipe.server.rounds,
        delta=options.delta,
    )


def _spent(recipe: Recipe, *, noise: float, num_clients: int, rounds: int) -> float:
    cost = partial(spent, sampling_rate=_rate(recipe, num_clients), delta=recipe.privacy.delta)
    return cost(noise=noise, rounds=rounds)
