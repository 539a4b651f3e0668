"""Which numbers leave a site beside its update, and how exact they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from orchard.client.client import Client
from orchard.communication.messages import LocalSettings
from orchard.communication.refusals import Code
from orchard.deployment.consent import Consent, Refusal
from orchard.experiment.methods import check_strategy, has_grafts, has_part
from orchard.experiment.preparation import Experiment
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words

# Of time, and of what the site holds and gives: they tell of no row.
_OF_NO_ROW = frozenset(
    {
        *("client/num_examples", "client/prepare_seconds", "client/train_seconds"),
        *("client/evaluation_seconds", "client/dropped_out", "client/budget_experts"),
        *("client/num_steps", "client/own_num_steps", "client/own_train_seconds"),
    }
)
_OF_TRAINING = frozenset({"client/train_loss", "client/num_tokens"})
_OF_JUDGES = ("client/own_", "client/shared_judged_")
_JOINED_WITH = "client/num_examples"  # whole, as when the site joined


def check_rows(experiment: Experiment, consent: Consent, *, client_id: str) -> None:
    """Refuse to measure on, or train on, fewer rows than the owner wants together.

    Of a round too: an update is numbers of the rows that its steps read.

    Raises:
        Refusal: There are fewer.
    """
    recipe, fewest = experiment.recipe, consent.min_test
    counts = {"data.test_size": ("training rows", len(experiment.train[client_id]))}
    _check(counts, fewest)
    client = recipe.client
    if client.steps:
        drawn = client.steps * client.batch_size * client.grad_accumulation
        _check({"client.steps": ("rows that a round trains on", drawn)}, fewest)
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
                f"{what} must be at least {fewest}, got {number}; hold out more or fewer, train on "
                "more in a round, or its owner lowers --min-test",
                option=option,
            )


def rounded(values: Mapping[str, float], consent: Consent) -> dict[str, float]:
    """Return values as exact as the owner lets them out.

    A value of 100 or more has fewer digits after the point, so that its digits are never more than
    those of a smaller one: a global tree that makes losses large makes them no more exact.
    """
    return {
        name: float(value) if name == _JOINED_WITH else _rounded(value, consent.decimals)
        for name, value in values.items()
    }


def _rounded(value: float, decimals: int) -> float:
    large = math.floor(math.log10(abs(value))) - 1 if 100 <= abs(value) < math.inf else 0
    return round(float(value), decimals - large)


@dataclass(frozen=True)
class Rows:
    """How many different rows the numbers of a round rest on, at least.

    Attributes:
        trained: Rows that training reads.
        ranked: Rows that experts are ranked on for longer than a batch.
        grafted: Rows that grafts are chosen on.
        judging: Rows that judge what a client trains apart.
    """

    trained: int
    ranked: int
    grafted: int
    judging: int = 0

    def behind(self, name: str) -> int:
        """Return how many rows a metric rests on."""
        if name in _OF_TRAINING:
            return self.trained
        if name.startswith(_OF_JUDGES):
            return self.judging
        chosen = self.grafted if name.startswith("client/graft_") else self.ranked
        return min(self.trained, chosen)


def rows_read(recipe: Recipe, client: Client, settings: LocalSettings) -> Rows:
    """Return how many rows a round reads."""
    number, methods = client.num_examples, check_strategy(recipe.strategy.name)
    step = client.training.batch_size * client.training.grad_accumulation
    trained = number if settings.epochs else min(number, settings.steps * step)
    ranked = grafted = number
    by_batch = "hfedmoe" in methods and recipe.selection.cadence in ("batch", "steps")
    if has_part(methods, "budget") and not by_batch:
        ranked = min(number, step * recipe.selection.scoring_batches)
    judging = min(number, round(recipe.strategy.holdout * number))
    if has_grafts(methods):
        pools = {"corpus": list(client.calibration_corpus), "own": list(client.train)}
        pool = pools.get(recipe.strategy.calibration)
        lengths = [len(own.input_ids) for own in (pool or client.majority_examples())]
        grafted = _rows_within(
            lengths, recipe.strategy.calibration_blocks * recipe.strategy.calibration_tokens
        )
    return Rows(trained, ranked, grafted, judging)


def _rows_within(lengths: Sequence[int], num_tokens: int) -> int:
    """Return the fewest rows that hold so many tokens; all where they hold fewer."""
    before = accumulate(sorted(lengths, reverse=True), initial=0)
    return min(len(lengths), sum(total < num_tokens for total in before))


def let_out(metrics: Mapping[str, float], consent: Consent, *, rows: Rows) -> dict[str, float]:
    """Return what of a round's metrics leaves.

    Args:
        metrics: Of local training.
        consent: The owner's.
        rows: What they rest on: a number of fewer rows than ``min_test`` stays, and any where the
            owner counts what the rows' privacy costs.
    """
    told = {
        name: value
        for name, value in metrics.items()
        if name in _OF_NO_ROW
        or (
            not consent.epsilon
            and (name.startswith("local/") or rows.behind(name) >= consent.min_test)
        )
    }
    return rounded(told, consent)
