"""Scores for generated text, and how a score varies over clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the ROUGE-L F1 of each prediction against its reference, in [0, 1].

    With the Porter stemmer, as FLEx reports it (their tables show 100 times the mean). Only the
    letters a to z and digits count: text in other scripts scores 0, even against itself.

    Source: Lin, 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.1, as in
    the package rouge_score.

    Raises:
        ValueError: The two have different lengths.
    """
    from rouge_score import rouge_scorer

    _check_lengths(predictions, references)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return [
        float(scorer.score(reference, prediction)["rougeL"].fmeasure)
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    normalize: Callable[[str], str] = str.strip,
) -> list[bool]:
    """Say of each prediction whether it equals its reference once both are normalized.

    Raises:
        ValueError: The two have different lengths.
    """
    _check_lengths(predictions, references)
    return [
        normalize(prediction) == normalize(reference)
        for prediction, reference in zip(predictions, references, strict=True)
    ]


@dataclass(frozen=True)
class Summary:
    """One metric over clients, in the metric's unit.

    Attributes:
        mean: The mean over clients, each counting once whatever its size.
        worst: The value of the client that fares worst.
        spread: The population standard deviation over clients; 0 for one client.
    """

    mean: float
    worst: float
    spread: float


def summarize(values: Mapping[str, float], *, higher_is_better: bool) -> Summary:
    """Summarize a metric over clients.

    NaN for one client makes all three NaN, so that a client that diverged is not hidden.

    Args:
        values: Client id -> value.
        higher_is_better: True for scores (worst = lowest), False for losses (worst = highest).

    Raises:
        ValueError: There is no client.
    """
    if not values:
        raise ValueError("values must hold at least one client, got none; evaluate a client first")
    # In the order of ids, so that the sum does not depend on who was evaluated first.
    array = np.asarray([values[client_id] for client_id in sorted(values)], dtype=np.float64)
    # An infinite value has the spread NaN; numpy would also warn.
    with np.errstate(invalid="ignore"):
        return Summary(
            mean=float(array.mean()),
            worst=float(array.min() if higher_is_better else array.max()),
            spread=float(array.std()),
        )


def _check_lengths(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions must be as many as references ({len(references)}), got "
            f"{len(predictions)}; give one prediction for each reference"
        )
