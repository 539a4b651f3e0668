"""Whether what a recipe asks for fits a site's memory, predicted before any weight is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from orchard.client.requirements import Requirements
from orchard.communication.refusals import Code
from orchard.deployment.consent import Consent, Refusal
from orchard.deployment.site_recipe import granted_memory
from orchard.evaluation.quality import METRICS
from orchard.experiment.budgets import build_requirements
from orchard.experiment.preparation import Experiment
from orchard.experiment.settings import lora_settings
from orchard.models.stored.loading import check_model
from orchard.process_memory import machine_memory_bytes
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words

log = logging.getLogger(__name__)


def check_fits(
    consent: Consent, experiment: Experiment, *, client_id: str, is_seated: bool = True
) -> None:
    """Refuse training or measuring that is predicted to take more memory than there is.

    That is what the owner gives with ``--memory``, and without it what this machine has; what a
    device of another kind has is not looked at.

    Args:
        consent: The owner's.
        experiment: The site's own recipe and rows.
        client_id: Of the site.
        is_seated: Whether the experiment says how many experts this site trains, which a list of
            budgets does once it is known whose is whose; else the fewest that it may.

    Raises:
        Refusal: It is predicted to take more. What cannot be predicted is said in the log.
    """
    recipe = experiment.recipe
    cap, whose = _cap(consent, recipe)
    if cap is None:
        return
    view = check_model(recipe.model.path, lora_settings(recipe))
    requirements = build_requirements(recipe, view)
    sizes = requirements.footprint
    budget = experiment.budgets[client_id] if is_seated else len(sizes.layers)
    if budget != 0:  # else it drops out, as its budget says
        try:
            peak = requirements.peak(sizes.num_experts if budget is None else budget).total
        except ValueError as error:  # of a family whose activations nobody can count
            log.warning("whether training fits this site is not known: %s", error)
            peak = 0
        if peak > cap:
            raise _refused("client.batch_size", "training", peak, cap, whose)
    if words(recipe.evaluation.models):
        measuring = _measuring(requirements, experiment, client_id)
        if measuring > cap:
            raise _refused("evaluation.batch_size", "evaluation", measuring, cap, whose)


def _cap(consent: Consent, recipe: Recipe) -> tuple[int | None, str]:
    if not consent.memory:
        if recipe.model.device != "cpu":
            return None, ""
        return machine_memory_bytes(), "the machine's memory; lower sizes, or take a larger one"
    return granted_memory(consent, recipe), "--memory"


def _measuring(requirements: Requirements, experiment: Experiment, client_id: str) -> int:
    """Return the bytes that measuring takes, by the longest of the site's own rows."""
    measured = experiment.recipe.evaluation
    rows = [*experiment.test[client_id], *experiment.retention]
    texts = [own for row in rows for own in (row.encoded, *row.options)]
    most_options = max((len(row.options) for row in rows), default=1) or 1
    generates = any(METRICS[metric] and metric != "accuracy" for metric in words(measured.metrics))
    return requirements.evaluation(
        batch_size=min(measured.batch_size, max(len(rows), 1)) * most_options,
        num_tokens=_longest([len(own.input_ids) for own in texts]),
        num_answered=_longest([len(own.input_ids) - own.prompt_length + 1 for own in texts]),
        num_new=measured.max_new_tokens if generates else 0,
    )


def _longest(lengths: Sequence[int]) -> int:
    return max(lengths, default=1)


def _refused(option: str, what: str, needed: int, cap: int, whose: str) -> Refusal:
    return Refusal(
        Code.MEMORY,
        f"{what} must take at most {cap / 1e9:.3g} GB at this site, got a prediction of "
        f"{needed / 1e9:.3g} GB; see {whose}",
        option=option,
    )
