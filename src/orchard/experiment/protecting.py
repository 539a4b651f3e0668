"""A privacy section becomes what is done to updates or gradients, or is refused as unsound."""

from __future__ import annotations

from collections.abc import Mapping

from orchard.client.private_training import num_private_steps, sampling_rate
from orchard.client.training import ExamplePrivacy
from orchard.communication.messages import LocalSettings
from orchard.experiment.methods import check_strategy, find_method, has_grafts, own_names
from orchard.experiment.settings import check_wanted
from orchard.recipe.options import Recipe
from orchard.seeding import Seeds
from orchard.server.accounting import affordable_rounds, noise_for, spent
from orchard.server.privacy import Protection, seeded_noise, system_noise

_CHOOSES = "which experts a client trains depends on its data, and shows in what it sends"
# Unit, then part of a method, or its name, to why they do not go together.
_UNSOUND: Mapping[str, Mapping[str, str]] = {
    "client": {
        "budget": _CHOOSES,
        "control": "control variates are sums over clients beside the one that is protected",
        "finetune": "its last rounds send nothing, and would have noise added all the same",
        "sharing": "nothing is sent that could be protected",
    },
    "example": {
        "budget": _CHOOSES,
        "control": "control variates are mean gradients without noise",
        "objective": "what it adds to the loss is not clipped for each example",
        "ditto": "its second training is not protected",
    },
}
Sizes = Mapping[str, int]
"""Client id to its training examples, whose number is no secret."""


def check_privacy(recipe: Recipe, sizes: Sizes) -> None:
    """Refuse a protection that would not hold, or whose cost is not stated.

    Raises:
        ValueError: It would not, or it is not.
    """
    options = recipe.privacy
    check_sound(recipe)
    if not options.unit:
        return
    number = len(sizes) if options.unit == "client" else max(sizes.values())
    if options.delta * number >= 1:
        whose = "the number of clients" if options.unit == "client" else "a client's examples"
        raise ValueError(
            f"privacy.delta must be below 1 / {number}, {whose}, got {options.delta:g}; a larger "
            f"one lets one {options.unit} be shown whole"
        )
    if protection := build_protection(recipe, sizes):
        _ = protection.sum_noise  # refuses a quantile that costs too much
    if private_rounds(recipe, sizes) == 0:
        raise ValueError(
            f"privacy.epsilon must pay for one round at least, got {options.epsilon:g} with noise "
            f"of {options.noise:g}; one costs {Costs(recipe, sizes).after(1):.3g}"
        )


def check_sound(recipe: Recipe) -> None:
    """Refuse a protection that would hold for no clients, whatever they have.

    Raises:
        ValueError: It would not, or no budget and no noise are stated.
    """
    options = recipe.privacy
    if not options.unit:
        return
    _check_method(recipe)
    if options.unit == "client":
        _check_server(recipe)
    elif recipe.client.router_aux_coefficient:
        raise ValueError(
            "client.router_aux_coefficient must be 0 with privacy.unit = example, got "
            f"{recipe.client.router_aux_coefficient:g}; it looks at all examples of a batch at once"
        )
    if not options.epsilon and not options.noise:
        raise ValueError(
            "privacy.epsilon or privacy.noise must be given with privacy.unit, got neither; "
            "for example privacy.epsilon=8"
        )


def _check_method(recipe: Recipe) -> None:
    unit, named = recipe.privacy.unit, recipe.strategy.name
    for name in check_strategy(named):
        if name in own_names(named):
            raise ValueError(
                f"strategy.name must be of Orchard's own methods with privacy.unit, got {name}; "
                "what another sends is not known to be bounded"
            )
        why = _UNSOUND[unit].get(name) or _UNSOUND[unit].get(find_method(name).part)
        if why:
            raise ValueError(
                f"strategy.name must not hold {name} with privacy.unit = {unit}, got {named}; {why}"
            )
        if unit == "example":
            _check_graft(name, recipe)


def _check_graft(name: str, recipe: Recipe) -> None:
    own = recipe.strategy
    if has_grafts([name]) and own.graft_choice == "reconstruction":
        raise ValueError(
            "strategy.graft_choice must be random with privacy.unit = example, got "
            f"{own.graft_choice}; which expert fits best is read from the examples without noise"
        )
    if name == "orchard" and own.judged_below:
        raise ValueError(
            "strategy.judged_below must be 0 with privacy.unit = example, got "
            f"{own.judged_below}; rows that judge a graft are not protected"
        )


def _check_server(recipe: Recipe) -> None:
    wanted = (
        (
            "server.aggregation",
            "mean",
            recipe.server.aggregation,
            "the noise is measured for a sum",
        ),
        (
            "server.weighting",
            "uniform",
            recipe.server.weighting,
            "how many examples a client has would count for its bound",
        ),
    )
    check_wanted(wanted, beside="privacy.unit = client")


class Costs:
    """What rounds of a recipe cost, and the noise for it.

    Of examples each client has noise of its own: who has fewest is in a batch most often, and needs
    most. So a client needs to know of no other, and each is taken to train in every round.
    """

    def __init__(self, recipe: Recipe, sizes: Sizes) -> None:
        """Find the noise of each, where ``privacy.epsilon`` asks for some.

        Raises:
            ValueError: No noise keeps the budget.
        """
        self._options = options = recipe.privacy
        # Rate and number of queries in a round, each kind once.
        self._queries = {client: queries(recipe, sizes, client) for client in sizes}
        self._noises = {
            (rate, number): options.noise
            or noise_for(
                epsilon=options.epsilon,
                sampling_rate=rate,
                rounds=recipe.server.rounds * number,
                delta=options.delta,
            )
            for rate, number in set(self._queries.values())
        }
        self.noises = {client: self._noises[query] for client, query in self._queries.items()}
        self.noise = max(self._noises.values())

    def of(self, client: str, rounds: int) -> float:
        """Return the epsilon of one client's examples, or of one client, after some rounds."""
        rate, number = self._queries[client]
        return spent(
            noise=self.noises[client],
            sampling_rate=rate,
            rounds=rounds * number,
            delta=self._options.delta,
        )

    def after(self, rounds: int) -> float:
        """Return the highest epsilon of any client after some rounds."""
        firsts = {query: client for client, query in self._queries.items()}
        return max(self.of(client, rounds) for client in firsts.values())

    def affordable(self, rounds: int) -> int:
        """Return how many of ``rounds`` the budget pays for, for every client."""
        return min(
            affordable_rounds(
                epsilon=self._options.epsilon,
                noise=noise,
                sampling_rate=rate,
                rounds=rounds * number,
                delta=self._options.delta,
            )
            // number
            for (rate, number), noise in self._noises.items()
        )


def queries(recipe: Recipe, sizes: Sizes, client: str) -> tuple[float, int]:
    """Return the sampling rate of what a round asks of a client's data, and how often it asks."""
    if recipe.privacy.unit == "client":
        return (recipe.server.clients_per_round or len(sizes)) / len(sizes), 1
    expected = recipe.client.batch_size * recipe.client.grad_accumulation
    local = LocalSettings(recipe.client.steps, recipe.client.epochs, 0.0)
    number = num_private_steps(sizes[client], expected=expected, local=local)
    return sampling_rate(sizes[client], expected), number


def build_protection(recipe: Recipe, sizes: Sizes) -> Protection | None:
    """Return what the server does to updates; None where it does nothing."""
    options = recipe.privacy
    if options.unit != "client":
        return None
    size = recipe.server.clients_per_round or len(sizes)
    return Protection(
        noise=Costs(recipe, sizes).noise,
        clip=options.clip,
        expected=float(size),
        quantile=options.clip_quantile,
        draw=system_noise if options.random == "system" else seeded_noise(Seeds(recipe.seed)),
    )


def example_privacy(recipe: Recipe, sizes: Sizes) -> Mapping[str, ExamplePrivacy]:
    """Return what each client does to gradients; nothing where none does anything."""
    options = recipe.privacy
    if options.unit != "example":
        return {}
    noises = Costs(recipe, sizes).noises
    return {
        client: ExamplePrivacy(noise, options.clip, options.random)
        for client, noise in noises.items()
    }


def private_rounds(recipe: Recipe, sizes: Sizes) -> int:
    """Return how many of ``server.rounds`` the budget pays for."""
    options, rounds = recipe.privacy, recipe.server.rounds
    if not options.unit or not options.epsilon or not options.noise:
        return rounds  # no budget, or noise that was chosen for all of them
    return Costs(recipe, sizes).affordable(rounds)


def privacy_facts(recipe: Recipe, sizes: Sizes, *, rounds: int) -> dict[str, object]:
    """Return what ``result.json`` says of privacy; nothing where there is none."""
    options = recipe.privacy
    if not options.unit:
        return {}
    costs = Costs(recipe, sizes)
    facts: dict[str, object] = {
        "unit": options.unit,
        "epsilon": costs.after(rounds),
        "delta": options.delta,
        "noise": costs.noise,
        "clip": options.clip,
        "clip_quantile": options.clip_quantile,
        "random": options.random,
    }
    if options.unit == "example":
        facts["epsilon_per_client"] = {client: costs.of(client, rounds) for client in sizes}
        facts["noise_per_client"] = costs.noises
    return {"privacy": facts}
