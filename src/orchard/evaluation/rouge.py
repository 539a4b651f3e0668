"""Scores for generated text, and how a score varies over clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchard.evaluation.words import (
    Characters,
    StemmedWords,
    is_blank,
    is_segmented,
    normalize,
    split_words,
)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the ROUGE-L F1 of each prediction against its reference, in [0, 1].

    With the Porter stemmer, as FLEx reports it (their tables show 100 times the mean), over the
    words of any script; see ``words``. Where a reference has no word, such as a sign alone, both
    are compared by their characters without white space; a prediction scores 1 against an
    empty reference where it is empty too, else 0.

    Source: Lin, 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.1, as in
    the package rouge_score, which it equals where all letters are a to z.

    Raises:
        ValueError: The two have different lengths.
    """
    from rouge_score import rouge_scorer

    check_lengths(predictions, references)
    words, segmented, characters = (
        rouge_scorer.RougeScorer(["rougeL"], tokenizer=tokenizer)
        for tokenizer in (StemmedWords(), StemmedWords(segmented=True), Characters())
    )
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        if is_blank(reference):
            scores.append(float(is_blank(prediction)))
            continue
        scorer = words if split_words(reference) else characters
        if is_segmented(prediction) and is_segmented(reference):
            scorer = segmented
        scores.append(float(scorer.score(reference, prediction)["rougeL"].fmeasure))
    return scores


def chrf(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the chrF2 of each prediction against its reference, in [0, 1].

    Character n-grams of 1 to 6, recall counting twice, case kept, white space left out; of each
    example by itself, so that a mean counts every example once. sacrebleu's corpus score adds up
    n-grams over examples instead and is another number. An empty reference as in ``rouge_l``.

    Source: Popovic, 2015, "chrF: character n-gram F-score for automatic MT evaluation", as in the
    package sacrebleu, which shows 100 times this.

    Raises:
        ValueError: The two have different lengths.
    """
    from sacrebleu.metrics.chrf import CHRF

    check_lengths(predictions, references)
    scorer = CHRF()
    return [
        float(is_blank(prediction))
        if is_blank(reference)
        else scorer.sentence_score(normalize(prediction), [normalize(reference)]).score / 100
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def _stripped(text: str) -> str:
    return normalize(text).strip()


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    normalize: Callable[[str], str] = _stripped,
) -> list[bool]:
    """Say of each prediction whether it equals its reference once both are normalized.

    By default that is without white space around them, and in NFC.

    Raises:
        ValueError: The two have different lengths.
    """
    check_lengths(predictions, references)
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


def check_lengths(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Check that there is one prediction for each reference.

    Raises:
        ValueError: There is not.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"predictions must be as many as references ({len(references)}), got "
            f"{len(predictions)}; give one prediction for each reference"
        )
