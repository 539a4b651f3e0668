"""A coordinator's recipe becomes a site's own, or is refused."""

from __future__ import annotations

from dataclasses import replace

from orchard.deployment.consent import Consent, Refusal
from orchard.experiment.budgets import build_requirements
from orchard.experiment.methods import check_strategy, has_part
from orchard.experiment.settings import lora_settings
from orchard.models.stored.loading import check_model
from orchard.recipe.amounts import parse_amounts
from orchard.recipe.method_options import BUILT_IN, method_names
from orchard.recipe.options import Recipe
from orchard.seeding import Seeds

PACKAGED = "orchard:"


def own_recipe(consent: Consent, recipe: Recipe) -> Recipe:
    """Return a recipe as a site does it: with its own files, model and limits.

    No path of the coordinator's is ever opened here, and nothing is imported that the site's owner
    did not name.

    Raises:
        Refusal: The site does not do what the recipe asks.
    """
    allowed = consent.methods or BUILT_IN
    # Before any of them is looked up: that would import what the coordinator names.
    if not set(method_names(recipe.strategy.name)) <= set(allowed):
        raise Refusal(
            f"strategy.name must be of {', '.join(allowed)} at this site, got "
            f"{recipe.strategy.name}; its owner names others with --methods"
        )
    methods = check_strategy(recipe.strategy.name)
    model = consent.model or recipe.model.path
    if not consent.model and not model.startswith(PACKAGED):
        raise Refusal(
            f"model.path must be a model that this site has, got {model}; its owner names one "
            "with --model"
        )
    if recipe.model.device != "cpu" and not recipe.model.device.startswith("cuda"):
        raise Refusal(f"model.device must be cpu or cuda, got {recipe.model.device}")
    client = recipe.client
    if consent.budget or consent.memory:
        if has_part(methods, "budget"):
            client = replace(client, budget=consent.budget, memory_bytes=consent.memory)
        elif consent.budget:
            raise Refusal(
                f"strategy.name must be one that trains a part of the experts: this site "
                f"trains {consent.budget}, got {recipe.strategy.name}, which trains all"
            )
    own = replace(
        recipe,
        model=replace(recipe.model, path=model),
        data=replace(recipe.data, path=consent.data, partition="file"),
        strategy=replace(
            recipe.strategy,
            calibration_path=_own_file(
                recipe.strategy.calibration_path, consent.calibration, "--calibration"
            ),
        ),
        evaluation=replace(
            recipe.evaluation,
            retention_path=_own_file(
                recipe.evaluation.retention_path, consent.retention, "--retention"
            ),
        ),
        client=client,
    )
    if consent.memory and client is recipe.client:
        _check_memory(consent, own)
    return own


def _own_file(asked: str, own: str, option: str) -> str:
    if not asked or asked.startswith(PACKAGED):
        return asked
    if not own:
        raise Refusal(f"{option} must name this site's own file, got nothing for {asked}")
    return own


def _check_memory(consent: Consent, recipe: Recipe) -> None:
    """Refuse training that is predicted to take more than this site gives."""
    (cap,) = parse_amounts(
        consent.memory,
        name="--memory",
        num_clients=1,
        generator=Seeds(recipe.seed).generator("budgets"),
        kind="bytes",
    )
    view = check_model(recipe.model.path, lora_settings(recipe))
    requirements = build_requirements(recipe, view)
    needed = requirements.peak(sum(requirements.footprint.layers.values())).total
    if needed > cap:
        raise Refusal(
            f"training must take at most {consent.memory} at this site, got a prediction of "
            f"{needed / 1e9:.3g} GB for {recipe.strategy.name}"
        )
