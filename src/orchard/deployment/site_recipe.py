"""A coordinator's recipe becomes a site's own, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchard.communication.refusals import Code
from orchard.deployment.consent import Consent, Refusal
from orchard.deployment.limits import check_limits
from orchard.deployment.terms import Terms
from orchard.experiment.budgets import build_requirements, client_limits
from orchard.experiment.checking import check_between_sites
from orchard.experiment.holdings import FACTS
from orchard.experiment.methods import check_strategy, has_part, own_names
from orchard.experiment.own_methods import own_digests
from orchard.experiment.settings import lora_settings
from orchard.models.stored.loading import check_model
from orchard.recipe.amounts import parse_amounts
from orchard.recipe.method_options import BUILT_IN, method_names
from orchard.recipe.options import Recipe
from orchard.recipe.reading import known_options, option_value
from orchard.seeding import Seeds

PACKAGED = "orchard:"


def check_methods(consent: Consent, recipe: Recipe) -> None:
    """Refuse a method that the owner did not allow, before anything of it is looked up.

    Looking it up would import what the coordinator names.

    Raises:
        Refusal: It is not allowed.
    """
    allowed = consent.methods or BUILT_IN
    if not set(method_names(recipe.strategy.name)) <= set(allowed):
        raise Refusal(
            Code.METHOD,
            f"strategy.name must be of {', '.join(allowed)} at this site, got "
            f"{recipe.strategy.name}; its owner names others with --methods",
            option="strategy.name",
        )


def check_sources(recipe: Recipe, theirs: Mapping[str, str]) -> None:
    """Refuse a method of one's own whose source is another one here than at the coordinator.

    Args:
        recipe: As this site does it.
        theirs: Methods to the SHA-256 of their sources, as the coordinator says.

    Raises:
        Refusal: It is another one.
    """
    for name, digest in own_digests(own_names(recipe.strategy.name)).items():
        if theirs.get(name) != digest:
            raise Refusal(
                Code.METHOD_SOURCE,
                f"{name} must have the coordinator's source at this site, got SHA-256 "
                f"{digest} for {theirs.get(name)}; install the same version",
                option="strategy.name",
            )


def without_cohort(recipe: Recipe) -> Recipe:
    """Return a recipe without what only all sites together can decide."""
    is_by_client = "," in recipe.client.budget + recipe.client.memory_bytes
    return replace(
        recipe,
        server=replace(recipe.server, clients_per_round=0),
        client=replace(recipe.client, budget="", memory_bytes="")
        if is_by_client
        else recipe.client,
    )


def differences(asked: Recipe, own: Recipe) -> list[str]:
    """Return the options that are a site's own, whatever was asked."""
    return [key for key in known_options() if option_value(asked, key) != option_value(own, key)]


def own_recipe(consent: Consent, recipe: Recipe, terms: Terms, *, num_clients: int = 1) -> Recipe:
    """Return a recipe as a site does it: with its own files, model, data section and limits.

    No path of the coordinator's is ever opened here, and nothing is imported that the site's owner
    did not name.

    Args:
        consent: The owner's.
        recipe: The coordinator's.
        terms: How the site's rows are read.
        num_clients: Sites of the federation, as the coordinator says.

    Raises:
        Refusal: The site does not do what the recipe asks.
    """
    check_methods(consent, recipe)
    try:
        check_between_sites(recipe)
    except ValueError as error:
        raise Refusal(Code.RECIPE, str(error), option=str(error).partition(" ")[0]) from error
    model = consent.model or recipe.model.path
    if not consent.model and not model.startswith(PACKAGED):
        raise Refusal(
            Code.MODEL,
            f"model.path must be a model that this site has, got {model}; its owner names one "
            "with --model",
            option="model.path",
        )
    if recipe.model.device != "cpu" and not recipe.model.device.startswith("cuda"):
        raise Refusal(
            Code.DEVICE,
            f"model.device must be cpu or cuda, got {recipe.model.device}",
            option="model.device",
        )
    own = terms.apply(recipe, data=consent.data)
    own = replace(
        own,
        model=replace(own.model, path=model, expert_cache=""),
        server=replace(own.server, start=""),  # a site is sent what a run starts from
        strategy=replace(
            own.strategy,
            calibration_path=_own_file(
                own.strategy.calibration_path, consent.calibration, "strategy.calibration_path"
            ),
        ),
        evaluation=replace(
            own.evaluation,
            retention_path=_own_file(
                own.evaluation.retention_path,
                consent.retention,
                "evaluation.retention_path",
                packaged=FACTS,
            ),
            shots_path="",  # shots there are none between sites
            # Text about the rows, on this site's disk: its owner's to say.
            keep_answers=own.evaluation.keep_answers and consent.keeps_answers,
        ),
    )
    check_limits(own, consent.limits, num_clients=num_clients)
    return _within_means(consent, own)


def _own_file(asked: str, own: str, option: str, *, packaged: str = "") -> str:
    if not asked or asked == packaged:
        return asked
    if not own:
        flag = "--calibration" if option.startswith("strategy") else "--retention"
        raise Refusal(
            Code.OWN_FILE,
            f"{flag} must name this site's own file, got nothing for {asked}",
            option=option,
        )
    return own


def _within_means(consent: Consent, recipe: Recipe) -> Recipe:
    """Return a recipe that keeps the owner's budget and memory, whatever its method and options.

    Raises:
        Refusal: There is none.
    """
    if not consent.budget and not consent.memory:
        return recipe
    methods = check_strategy(recipe.strategy.name)
    if not has_part(methods, "budget"):
        if consent.budget:
            raise Refusal(
                Code.BUDGET,
                f"strategy.name must be one that trains a part of the experts: this site trains "
                f"{consent.budget}, got {recipe.strategy.name}, which trains all",
                option="strategy.name",
            )
        _check_memory(consent, recipe)
        return recipe
    if "hfedmoe" in methods and recipe.selection.rank_by == "none":
        raise Refusal(
            Code.BUDGET,
            f"selection.rank_by must choose experts: this site trains "
            f"{consent.budget or 'what fits ' + consent.memory}, got none, which trains all",
            option="selection.rank_by",
        )
    given = replace(recipe.client, budget=consent.budget, memory_bytes=consent.memory)
    if not (consent.budget and consent.memory):
        return replace(recipe, client=given)
    return replace(recipe, client=replace(given, budget=_smaller(consent, recipe), memory_bytes=""))


def _smaller(consent: Consent, recipe: Recipe) -> str:
    """Return the smaller one of what the owner's budget and memory afford, in experts."""
    view = check_model(recipe.model.path, lora_settings(recipe))
    budgets = []
    for budget, memory in ((consent.budget, ""), ("", consent.memory)):
        client = replace(recipe.client, budget=budget, memory_bytes=memory)
        (limit,) = client_limits(replace(recipe, client=client), view, num_clients=1)
        if limit.reason:
            raise Refusal(Code.MEMORY if memory else Code.BUDGET, limit.reason)
        assert limit.budget is not None
        budgets.append(limit.budget)
    return str(min(budgets))


def granted_memory(consent: Consent, recipe: Recipe) -> int:
    """Return the bytes that the owner's ``--memory`` lets training take."""
    (cap,) = parse_amounts(
        consent.memory,
        name="--memory",
        num_clients=1,
        generator=Seeds(recipe.seed).generator("budgets"),
        kind="bytes",
    )
    return int(cap)


def _check_memory(consent: Consent, recipe: Recipe) -> None:
    """Refuse training that is predicted to take more than this site gives."""
    cap = granted_memory(consent, recipe)
    view = check_model(recipe.model.path, lora_settings(recipe))
    requirements = build_requirements(recipe, view)
    needed = requirements.peak(sum(requirements.footprint.layers.values())).total
    if needed > cap:
        raise Refusal(
            Code.MEMORY,
            f"training must take at most {consent.memory} at this site, got a prediction of "
            f"{needed / 1e9:.3g} GB for {recipe.strategy.name}",
            option="strategy.name",
        )
