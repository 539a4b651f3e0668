"""Which numbers leave a site beside its update, and how exact they are."""

from __future__ import annotations

from collections.abc import Mapping

from orchard.client.training import TrainingSettings
from orchard.communication.messages import LocalSettings
from orchard.communication.refusals import Code
from orchard.deployment.consent import Consent, Refusal
from orchard.experiment.preparation import Experiment
from orchard.recipe.reading import words

# Of time, and of what the site holds and gives: they tell of no row.
_OF_NO_ROW = frozenset(
    {
        *("client/num_examples", "client/prepare_seconds", "client/train_seconds"),
        *("client/evaluation_seconds", "client/dropped_out", "client/budget_experts"),
    }
)


def check_rows(experiment: Experiment, consent: Consent, *, client_id: str) -> None:
    """Refuse to measure on, or train on, fewer rows than the owner wants together.

    Raises:
        Refusal: There are fewer.
    """
    recipe, fewest = experiment.recipe, consent.min_test
    counts = {"data.test_size": ("training rows", len(experiment.train[client_id]))}
    _check(counts, fewest)
    if words(recipe.evaluation.models):
        counts = {"data.test_size": ("held-out rows", len(experiment.test[client_id]))}
        if consent.retention and recipe.evaluation.retention_path == consent.retention:
            counts["evaluation.retention_path"] = ("rows of retention", len(experiment.retention))
        _check(counts, fewest)


def _check(counts: Mapping[str, tuple[str, int]], fewest: int) -> None:
    for option, (what, number) in counts.items():
        if number < fewest:
            raise Refusal(
                Code.FEW_ROWS,
                f"{what} must be at least {fewest}, got {number}; hold out more or fewer, or its "
                "owner lowers --min-test",
                option=option,
            )


def rounded(values: Mapping[str, float], consent: Consent) -> dict[str, float]:
    """Return values as exact as the owner lets them out."""
    return {name: round(float(value), consent.decimals) for name, value in values.items()}


def num_rows_read(num_examples: int, training: TrainingSettings, settings: LocalSettings) -> int:
    """Return how many different rows a round of training reads."""
    if settings.epochs:
        return num_examples
    drawn = settings.steps * training.batch_size * training.grad_accumulation
    return min(num_examples, drawn)


def let_out(metrics: Mapping[str, float], consent: Consent, *, num_rows: int) -> dict[str, float]:
    """Return what of a round's metrics leaves.

    Args:
        metrics: Of local training.
        consent: The owner's.
        num_rows: Rows that training read: below ``min_test``, what tells of rows stays.
    """
    told = {
        name: value
        for name, value in metrics.items()
        if num_rows >= consent.min_test or name in _OF_NO_ROW or name.startswith("local/")
    }
    return rounded(told, consent)
