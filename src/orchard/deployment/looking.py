"""What an owner is shown before the site joins anything: asked, read, sent, kept, and the cost."""

from __future__ import annotations

from collections.abc import Sequence

from orchard.communication.readable import readable
from orchard.deployment.consent import SiteSettings
from orchard.deployment.limits import LIMITS
from orchard.deployment.terms import term_keys
from orchard.experiment.methods import check_strategy, has_grafts, has_part
from orchard.experiment.planning import ClientPlan, make_plan
from orchard.experiment.preparation import Experiment
from orchard.recipe.options import Recipe
from orchard.recipe.reading import format_value, option_value, words


class LookingError(Exception):
    """The site was asked to join, and only looks."""


def describe(
    experiment: Experiment, settings: SiteSettings, *, run: str, differs: Sequence[str]
) -> str:
    """Return what joining a run would mean, as text for the owner.

    Args:
        experiment: The site's own recipe and rows.
        settings: The site's.
        run: What the coordinator calls its run.
        differs: Options that are the site's own, whatever the coordinator asked.

    Raises:
        ValueError: The cost cannot be predicted.
    """
    recipe, name = experiment.recipe, settings.name
    (plan,) = make_plan(recipe, federation=experiment.federation).clients
    parts = {
        f"run {readable(run)} asks": _asked(recipe),
        "would be read": _read(experiment, settings),
        "would be sent": _sent(recipe, plan, settings),
        "would be kept": _kept(recipe, settings),
        "would cost": _cost(recipe, plan),
        "is this site's own, not the coordinator's": [
            f"{key} = {readable(format_value(option_value(recipe, key)))}" for key in differs
        ],
        "limits of this site": [
            f"{key} <= {limit:g}"
            for key, limit in sorted({**LIMITS, **settings.consent.limits}.items())
        ],
    }
    lines = [f"site {name}, nothing joined"]
    for title, entries in parts.items():
        lines += ["", f"{title}:", *(f"  {entry}" for entry in entries or ["nothing"])]
    return "\n".join(lines) + "\n"


def _asked(recipe: Recipe) -> list[str]:
    client, models = recipe.client, recipe.evaluation.models
    length = f"{client.steps} steps" if client.steps else f"{client.epochs} passes"
    often = f"every {recipe.evaluation.every} rounds, and " if recipe.evaluation.every else ""
    return [
        f"method {readable(recipe.strategy.name)} on {recipe.model.path}",
        f"{recipe.server.rounds} rounds of {length} of {client.batch_size} x "
        f"{client.grad_accumulation} rows, {client.optimizer}, learning rate "
        f"{client.lr:g}" + (" (by the model's width)" if client.lr == 0 else ""),
        f"measures {readable(recipe.evaluation.metrics)} of {readable(models)}, {often}after the "
        "last round"
        if models
        else "measures nothing",
    ]


def _read(experiment: Experiment, settings: SiteSettings) -> list[str]:
    recipe, data = experiment.recipe, experiment.recipe.data
    said = {key: option_value(recipe, key) for key in term_keys()}
    before = {key: option_value(Recipe(), key) for key in term_keys()}
    entries = [
        f"{data.path}: {len(experiment.train[settings.name])} rows to train on, "
        f"{len(experiment.test[settings.name])} held out",
        f"the columns {data.instruction}, {data.context}, {data.response} and {data.category}, "
        f"where they are, by the template {data.template}",
        *(
            f"{key} = {readable(format_value(value))}"
            for key, value in said.items()
            if value != before[key]
        ),
    ]
    for what, path in (
        ("calibration", recipe.strategy.calibration_path),
        ("retention", recipe.evaluation.retention_path),
    ):
        if path:
            entries.append(f"{what}: {path}")
    return entries


def _sent(recipe: Recipe, plan: ClientPlan, settings: SiteSettings) -> list[str]:
    consent, rounds = settings.consent, recipe.server.rounds
    entries = [
        f"when it joins: its name and {plan.num_examples}, the number of its rows to train on",
        f"in each of {rounds} rounds: an update of at most {_size(plan.uplink_bytes)}, which "
        "holds no name of what is kept",
        "with it: losses and counts of training, seconds",
    ]
    if words(recipe.evaluation.models):
        entries.append(
            f"where models are measured: means over {consent.min_test} rows or more, to "
            f"{consent.decimals} digits after the point, for at most {consent.trees_per_round} "
            "global trees a round"
        )
    return [*entries, "instead of an error: a code and the name of an option"]


def _kept(recipe: Recipe, settings: SiteSettings) -> list[str]:
    methods = check_strategy(recipe.strategy.name)
    entries = [
        f"{settings.store}: the audit log, this run's terms, logs",
        "the recipe and the global values that it was sent last, for its own model",
    ]
    if has_grafts(methods):
        entries.append("grafts and their gates, the last three versions, which are never sent")
    if has_part(methods, "control"):
        entries.append("control variates")
    if recipe.evaluation.keep_answers:
        entries.append("the answers that are generated over held-out rows")
    return entries


def _cost(recipe: Recipe, plan: ClientPlan) -> list[str]:
    if plan.peak is None:
        return [f"nothing: it cannot take part ({plan.limit.reason})"]
    client, rounds = recipe.client, recipe.server.rounds
    rows = client.steps * client.batch_size * client.grad_accumulation
    total = rows * rounds if client.steps else client.epochs * plan.num_examples * rounds
    return [
        f"memory: {_size(plan.peak.total)} at the peak of training, as predicted",
        f"training: {plan.trainable:,} parameters, {total:,} rows read forward and backward in all",
        f"network: {_size(plan.downlink_bytes)} down and at most {_size(plan.uplink_bytes)} up a "
        "round",
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
