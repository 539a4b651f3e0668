"""What a site's updates have cost its rows in privacy so far, over all runs, and what is left.

Each training with noise on its gradients is written down before it begins, so that a site that is
killed in the middle has paid for it: its noise may have been seen. Training again costs again.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from orchard.communication.refusals import Code
from orchard.deployment.consent import Consent, Refusal
from orchard.deployment.failures import in_words
from orchard.experiment.protecting import Costs, queries
from orchard.recipe.options import Recipe
from orchard.results import write_json
from orchard.server.accounting import spent_together

LEDGER_FILE = "privacy.json"
"""Of a site's store."""


def check_owner(consent: Consent, recipe: Recipe) -> None:
    """Refuse a recipe by which more of the rows leaves than the owner's ``--epsilon`` counts.

    Raises:
        Refusal: Updates without noise, or with noise that others can draw, or measures of rows.
    """
    if not consent.epsilon:
        return
    for option, wanted, got, why in (
        ("privacy.unit", "example", recipe.privacy.unit, "its updates need noise"),
        ("privacy.random", "system", recipe.privacy.random, "a seed is known to others"),
        ("evaluation.models", "", recipe.evaluation.models, "what is measured has no noise"),
    ):
        if got != wanted:
            raise Refusal(
                Code.PRIVACY,
                f"{option} must be {wanted or 'empty'} with --epsilon {consent.epsilon:g}, got "
                f"{got or 'nothing'}; {why}",
                option=option,
            )


@dataclass(frozen=True)
class Ledger:
    """The trainings of a site that cost its rows something.

    Attributes:
        store: The site's folder.
    """

    store: Path

    def check_whole(self, recipe: Recipe, consent: Consent, *, site: str, rows: int) -> None:
        """Refuse a run whose rounds together are more than what is left.

        Raises:
            Refusal: They are.
        """
        kind, number = _kind(recipe, site, rows)
        self._check(self._read(), kind, number * recipe.server.rounds, consent, what="the run")

    def charge(self, recipe: Recipe, consent: Consent, *, site: str, rows: int) -> float:
        """Write down what the training of a round costs, and return epsilon after it.

        Args:
            recipe: As the site does it, with ``privacy.unit = example``.
            consent: The owner's, with the most that all may cost, and delta.
            site: The name of the site.
            rows: How many it trains on.

        Raises:
            Refusal: It would be more than the owner gives; nothing is written.
        """
        kind, number = _kind(recipe, site, rows)
        trained = self._read()
        epsilon = self._check(trained, kind, number, consent, what="this round")
        trained[kind] += number
        write_json(
            self.store / LEDGER_FILE,
            {
                "trained": [
                    {"noise": noise, "sampling_rate": rate, "steps": steps}
                    for (noise, rate), steps in sorted(trained.items())
                ],
                "epsilon": epsilon,
                "delta": consent.delta,
            },
        )
        return epsilon

    def _check(
        self,
        trained: Counter[tuple[float, float]],
        kind: tuple[float, float],
        number: int,
        consent: Consent,
        *,
        what: str,
    ) -> float:
        epsilon = spent_together(trained + Counter({kind: number}), delta=consent.delta)
        if consent.epsilon and epsilon > consent.epsilon:
            before = spent_together(trained, delta=consent.delta)
            raise Refusal(
                Code.PRIVACY,
                f"epsilon of this site's rows must be at most {consent.epsilon:g} by --epsilon, "
                f"and {what} would make it {epsilon:.3g}, from {before:.3g}; take part in shorter "
                "runs with more noise, or raise --epsilon",
                option="--epsilon",
            )
        return epsilon

    def _read(self) -> Counter[tuple[float, float]]:
        """Return how many steps there were of each noise and sampling rate.

        Raises:
            Refusal: The file is damaged: a count that began anew would be too low.
        """
        path = self.store / LEDGER_FILE
        if not path.exists():
            return Counter()
        try:
            rows = json.loads(path.read_text())["trained"]
            return Counter(
                {
                    (float(row["noise"]), float(row["sampling_rate"])): int(row["steps"])
                    for row in rows
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(
                Code.PRIVACY,
                f"{LEDGER_FILE} in the store must say what was trained, got something else "
                f"({in_words(error)}); bring it back from a copy, or begin a new store",
                option="--epsilon",
            ) from error


def _kind(recipe: Recipe, site: str, rows: int) -> tuple[tuple[float, float], int]:
    """Return the noise and sampling rate of a round's steps, and how many there are."""
    sizes = {site: rows}
    rate, number = queries(recipe, sizes, site)
    return (Costs(recipe, sizes).noise, rate), number
