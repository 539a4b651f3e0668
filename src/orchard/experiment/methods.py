"""Names of methods become strategies.

The table below has all that come with Orchard: the command line, the documentation and the tests
read the same one. A name that is not in it is that of a method of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from orchard.experiment.own_methods import Transform, as_method, find_own, offered
from orchard.experiment.parts import PARTS, Method
from orchard.experiment.settings import graft_settings, subset_settings
from orchard.experts.graft_search import SearchSettings
from orchard.recipe.method_options import BUILT_IN, method_names
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.server.lora_product import product_delta
from orchard.server.optimizers import SGD
from orchard.server.robust import MIN_CONTRIBUTORS, RobustSettings, robust_aggregate
from orchard.strategies.arriving import arriving
from orchard.strategies.ditto import ditto
from orchard.strategies.fedavg_dropout import fedavg_dropout
from orchard.strategies.fedavg_random import fedavg_random
from orchard.strategies.fedmoe import fedmoe
from orchard.strategies.fedopt import adaptive, fedavgm
from orchard.strategies.fedprox import fedprox
from orchard.strategies.finetune import finetune
from orchard.strategies.flex import FlexSettings, flex
from orchard.strategies.hfedmoe import HfedmoeSettings, hfedmoe
from orchard.strategies.local import local
from orchard.strategies.orchard import orchard
from orchard.strategies.pflmoe import pflmoe
from orchard.strategies.scaffold import scaffold
from orchard.strategies.seermoe import seermoe
from orchard.strategies.session import SubsetSettings
from orchard.strategies.splitting import Split, in_turn, split_names
from orchard.strategies.strategy import Aggregate, Strategy, by_num_examples, mean_delta, uniformly

ADAPTIVE_LR = 1e-3  # of FedAdagrad, FedAdam and FedYogi in FLEx's code


def _adaptive(rule: str) -> Callable[[Strategy, Recipe, int], Strategy]:
    def apply(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
        s = recipe.server
        # In the paper FedAdagrad has no momentum.
        beta1 = 0.0 if rule == "adagrad" else s.beta1
        lr = s.lr or ADAPTIVE_LR
        return adaptive(strategy, rule=rule, lr=lr, beta1=beta1, beta2=s.beta2, tau=s.tau)

    return apply


def _fedavgm(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
    s = recipe.server
    return fedavgm(strategy, lr=s.lr or 1.0, momentum=s.momentum, dampening=s.dampening)


def _flex_settings(recipe: Recipe) -> FlexSettings:
    s = recipe.strategy
    has_budget = has_part(check_strategy(s.name), "budget")
    return FlexSettings(
        graft=graft_settings(recipe),
        num_experts=s.graft_experts,
        budget=s.graft_budget,
        choice=s.graft_choice,
        search=SearchSettings(loss=s.graft_loss, max_sets=s.graft_max_sets),
        calibration=s.calibration,
        calibration_blocks=s.calibration_blocks,
        calibration_tokens=s.calibration_tokens,
        holds_all=not (has_budget and recipe.selection.mode == "carve"),
    )


def _flex(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
    return flex(strategy, _flex_settings(recipe))


def _orchard(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
    own = recipe.strategy
    settings = _flex_settings(recipe)
    return orchard(strategy, settings, judged_below=own.judged_below, holdout=own.holdout)


def _ditto(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
    return ditto(strategy, strength=recipe.strategy.ditto_lambda)


def _finetune(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
    rounds, last = recipe.server.rounds, recipe.strategy.finetune_rounds
    if last >= rounds:
        raise ValueError(
            f"strategy.finetune_rounds must be in 1..{rounds - 1} (server.rounds less one), got "
            f"{last}; lower it, or raise server.rounds"
        )
    if recipe.server.clients_per_round not in (0, num_clients):
        raise ValueError(
            f"server.clients_per_round must be 0 with finetune, got "
            f"{recipe.server.clients_per_round}; every client fine-tunes in the last rounds"
        )
    return finetune(strategy, after_round=rounds - last)


def _hfedmoe(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
    s = recipe.selection
    return hfedmoe(
        strategy,
        HfedmoeSettings(
            subset=subset_settings(recipe),
            threshold=s.threshold,
            require_trained=s.require_trained,
            experts=s.experts,
            router=s.router,
        ),
    )


def _seermoe(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
    coefficient = recipe.strategy.entropy_coefficient
    return seermoe(strategy, subset_settings(recipe), entropy_coefficient=coefficient)


def _with_subset(
    method: Callable[[Strategy, SubsetSettings], Strategy],
) -> Callable[[Strategy, Recipe, int], Strategy]:
    return lambda strategy, recipe, num_clients: method(strategy, subset_settings(recipe))


def _scaffold(strategy: Strategy, recipe: Recipe, num_clients: int) -> Strategy:
    cohort = recipe.server.clients_per_round or num_clients
    return scaffold(strategy, participation=cohort / num_clients)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "fedavg": Method(
            *BUILT_IN["fedavg"],
            "server",
            lambda strategy, recipe, num_clients: strategy,
        ),
        "fedavgm": Method(*BUILT_IN["fedavgm"], "server", _fedavgm),
        "fedadagrad": Method(
            *BUILT_IN["fedadagrad"],
            "server",
            _adaptive("adagrad"),
        ),
        "fedadam": Method(*BUILT_IN["fedadam"], "server", _adaptive("adam")),
        "fedyogi": Method(*BUILT_IN["fedyogi"], "server", _adaptive("yogi")),
        "fedprox": Method(
            *BUILT_IN["fedprox"],
            "objective",
            lambda strategy, recipe, num_clients: fedprox(strategy, mu=recipe.strategy.prox_mu),
        ),
        "hfedmoe": Method(
            *BUILT_IN["hfedmoe"],
            "budget",
            _hfedmoe,
        ),
        "fedavg_dropout": Method(
            *BUILT_IN["fedavg_dropout"],
            "budget",
            lambda strategy, recipe, num_clients: fedavg_dropout(strategy),
        ),
        "fedavg_random": Method(
            *BUILT_IN["fedavg_random"],
            "budget",
            _with_subset(fedavg_random),
        ),
        "pflmoe": Method(
            *BUILT_IN["pflmoe"],
            "budget",
            _with_subset(pflmoe),
        ),
        "fedmoe": Method(
            *BUILT_IN["fedmoe"],
            "budget",
            _with_subset(fedmoe),
        ),
        "seermoe": Method(
            *BUILT_IN["seermoe"],
            "budget",
            _seermoe,
        ),
        "flex": Method(
            *BUILT_IN["flex"],
            "experts",
            _flex,
        ),
        "ditto": Method(*BUILT_IN["ditto"], "private", _ditto),
        "finetune": Method(*BUILT_IN["finetune"], "private", _finetune),
        "orchard": Method(*BUILT_IN["orchard"], "private", _orchard),
        "scaffold": Method(
            *BUILT_IN["scaffold"],
            "control",
            _scaffold,
        ),
        "local": Method(
            *BUILT_IN["local"],
            "sharing",
            lambda strategy, recipe, num_clients: local(strategy),
        ),
    }
)
"""Name of a method to what it is; ``strategy.name`` joins several by ``+``."""


def find_method(name: str) -> Method:
    """Return the method of one name: of the table, or one's own, which is imported.

    Raises:
        ValueError: There is none.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name and name not in (others := offered()):
        raise ValueError(
            f"strategy.name must be of {', '.join([*METHODS, *others])} or module:attribute, got "
            f"{name}; join several by +, such as flex+fedadam"
        )
    return find_own(name)


def check_strategy(name: str) -> tuple[str, ...]:
    """Return the methods of ``strategy.name`` in the order in which they are put together.

    Raises:
        ValueError: A name is unknown, stands twice, or does not go with another.
    """
    names = method_names(name)
    return _in_order({part: find_method(part) for part in names}, names)


def own_names(name: str) -> tuple[str, ...]:
    """Return the methods of ``strategy.name`` that do not come with Orchard."""
    return tuple(part for part in method_names(name) if part not in METHODS)


def _in_order(methods: Mapping[str, Method], names: Sequence[str]) -> tuple[str, ...]:
    """Return names in the order in which they are put together.

    Raises:
        ValueError: A name stands twice, or does not go with another.
    """
    name = "+".join(names)
    if len(set(names)) < len(names):
        raise ValueError(f"strategy.name must name a method once, got {name}")
    of_part = {part: [n for n in names if methods[n].part == part] for part in PARTS}
    for part, what in (
        ("server", "server optimizer"),
        ("budget", "way to fit a budget"),
        ("private", "way to a model of a client's own"),
    ):
        if len(of_part[part]) > 1:
            raise ValueError(
                f"strategy.name must have one {what}, got {' and '.join(of_part[part])}"
            )
    if of_part["budget"] and of_part["control"]:
        raise ValueError(
            f"strategy.name must not join {of_part['budget'][0]} with {of_part['control'][0]}, "
            "got both; a control variate needs every gradient of every round"
        )
    if of_part["private"]:
        private = of_part["private"][0]
        parts = ["budget", "control", "sharing", *(["experts"] if private != "finetune" else [])]
        beside = [n for part in parts for n in of_part[part]]
        if beside:
            raise ValueError(
                f"strategy.name must not join {private} with {beside[0]}, got {name}; what clients "
                "keep would be of two kinds"
            )
    others = [n for part in PARTS if part not in ("experts", "sharing") for n in of_part[part]]
    if of_part["sharing"] and others:
        raise ValueError(
            f"strategy.name must not join {of_part['sharing'][0]} with {others[0]}, got {name}; "
            "nothing is shared that it could act on"
        )
    return tuple(name for part in PARTS for name in of_part[part])


def require_path(recipe: Recipe) -> None:
    """Check that a recipe names a model.

    Raises:
        ValueError: It does not.
    """
    if not recipe.model.path:
        raise ValueError(
            "model.path must be given, got nothing; for example model.path=FOLDER on the command "
            "line, or orchard:tiny"
        )


def has_part(names: Iterable[str], part: str) -> bool:
    """Say whether one of these methods decides ``part``; see ``Method``."""
    return any(find_method(name).part == part for name in names)


def has_grafts(names: Iterable[str]) -> bool:
    """Say whether clients of these methods have grafts."""
    return bool({"flex", "orchard"} & set(names))


def check_aggregation(recipe: Recipe, *, num_clients: int) -> None:
    """Refuse a robust kernel where the method needs the mean, or clients are too few for it.

    Raises:
        ValueError: It does, or they are.
    """
    kind, names = recipe.server.aggregation, check_strategy(recipe.strategy.name)
    if kind == "mean":
        return
    cohort = recipe.server.clients_per_round or num_clients
    if cohort < MIN_CONTRIBUTORS:
        raise ValueError(
            f"server.aggregation must be mean with {cohort} clients in a round, got {kind}; a "
            f"robust one takes at least {MIN_CONTRIBUTORS}"
        )
    if "scaffold" in names:
        raise ValueError(
            f"server.aggregation must be mean with scaffold, got {kind}; its control variates are "
            "means over clients"
        )
    if "hfedmoe" in names and recipe.selection.router in ("literal", "damped"):
        raise ValueError(
            f"server.aggregation must be mean with selection.router = {recipe.selection.router}, "
            f"got {kind}; that sums routers by the clients' preferences"
        )


def check_lora_product(recipe: Recipe) -> None:
    """Refuse the mean of adapters' products where something else acts on their factors.

    Raises:
        ValueError: It does.
    """
    server, strategy, sent = recipe.server, recipe.strategy, recipe.communication
    names = set(check_strategy(strategy.name)) - {"fedavg"}
    acting = sorted(n for n in names & METHODS.keys() if METHODS[n].part in ("server", "control"))
    splits = [key for key in ("shared", "kept") if "lora_" in getattr(strategy, key)]
    reasons = {
        f"server.aggregation = {server.aggregation}": server.aggregation != "mean",
        f"server.lr = {server.lr:g}": server.lr not in (0.0, 1.0),
        f"{''.join(acting[:1])} in strategy.name": bool(acting),
        "local in strategy.name": "local" in names,
        f"strategy.{''.join(splits[:1])} on single factors": bool(splits),
        "router in model.lora_targets": "router" in words(recipe.model.lora_targets),
        "privacy.secure_aggregation": recipe.privacy.secure_aggregation,
        f"privacy.unit = {recipe.privacy.unit}": recipe.privacy.unit == "client",
        "what encoding took from factors (communication.feedback)": sent.feedback
        and (sent.dtype == "int8" or sent.top_k > 0),
        "deployment.stragglers = late": recipe.deployment.stragglers == "late",
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ValueError(
                f"server.lora_aggregation must be factors with {reason}, got product; the mean of "
                "products turns the factors anew each round, on which that acts one by one"
            )


def build_strategy(
    recipe: Recipe, *, num_clients: int, own: Mapping[str, Transform] | None = None
) -> Strategy:
    """Return the federated method of a recipe.

    Args:
        recipe: Names its methods.
        num_clients: Of the federation.
        own: Name to function of methods to join to them, without looking them up.

    Raises:
        ValueError: See ``check_strategy``; or a method of one's own cannot be put on.
    """
    weigh = by_num_examples if recipe.server.weighting == "examples" else uniformly
    check_aggregation(recipe, num_clients=num_clients)
    server = recipe.server
    aggregate: Aggregate = mean_delta
    if server.aggregation != "mean":
        aggregate = robust_aggregate(RobustSettings(server.aggregation, server.trim, server.clip))
    if server.lora_aggregation == "product":
        check_lora_product(recipe)
        aggregate = product_delta
    strategy = Strategy(weigh=weigh, aggregate=aggregate, optimizer=SGD(lr=server.lr or 1.0))
    named, passed = method_names(recipe.strategy.name), own or {}
    methods = {name: find_method(name) for name in named}
    methods |= {name: as_method(function, name=name) for name, function in passed.items()}
    order = _in_order(methods, [*named, *passed])
    check_split(recipe, order)
    split = Split(words(recipe.strategy.shared), words(recipe.strategy.kept))
    is_split = split == Split()
    for name in order:
        # What is sent is decided when the server is, before what others do with it.
        if not is_split and methods[name].part != "server":
            strategy, is_split = split_names(strategy, split), True
        strategy = methods[name].apply(strategy, recipe, num_clients)
    strategy = strategy if is_split else split_names(strategy, split)
    if recipe.strategy.kept_steps:
        strategy = in_turn(strategy, kept_steps=recipe.strategy.kept_steps)
    if recipe.data.arriving:
        check_arriving(recipe, order, num_clients=num_clients)
        strategy = arriving(strategy, after_round=recipe.server.rounds)
    return strategy


def check_arriving(recipe: Recipe, names: Sequence[str], *, num_clients: int) -> None:
    """Refuse clients that arrive after training where that means nothing, or is not known to.

    Raises:
        ValueError: It does not, or it is not.
    """
    number = recipe.data.arriving
    stay = num_clients - number
    if stay < max(1, recipe.server.clients_per_round):
        raise ValueError(
            f"data.arriving must leave a cohort of {max(1, recipe.server.clients_per_round)} of "
            f"{num_clients} clients, got {number}; lower it, or add clients"
        )
    parts = {name: METHODS[name].part if name in METHODS else "" for name in names}
    for name, part in parts.items():
        if part in ("budget", "control", ""):
            raise ValueError(
                f"data.arriving must be 0 with {name}, got {number}; what a client that arrives "
                "would train is not known of that method"
            )
    if recipe.privacy.unit or recipe.privacy.secure_aggregation:
        raise ValueError(
            f"data.arriving must be 0 with an option of privacy, got {number}; rounds in which "
            "nothing is sent are not counted there"
        )


def check_split(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse a split of names, or steps in turn, that the rest of a recipe does not go with.

    Raises:
        ValueError: It does not.
    """
    s, client = recipe.strategy, recipe.client
    budgets = [name for name in names if name in METHODS and METHODS[name].part == "budget"]
    for key, value in (("shared", s.shared), ("kept", s.kept)):
        if value and budgets:
            raise ValueError(
                f"strategy.{key} must be empty with {budgets[0]}, got {value}; which experts are "
                "sent is what that method decides"
            )
        if value and not words(value):
            raise ValueError(f"strategy.{key} must name patterns, got {value!r}; leave it empty")
    if s.kept_steps:
        if not (s.kept or "flex" in names) or "local" in names:
            raise ValueError(
                f"strategy.kept_steps must be 0 where nothing is kept beside what is sent, got "
                f"{s.kept_steps}; give strategy.kept"
            )
        if client.steps and s.kept_steps >= client.steps:
            raise ValueError(
                f"strategy.kept_steps must be in 0..{client.steps - 1} (client.steps less one), "
                f"got {s.kept_steps}; what is sent needs steps, too"
            )
