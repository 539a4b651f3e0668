"""How good a model is on held-out examples: loss, ROUGE-L, exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from orchard.data.templates import Encoded
from orchard.evaluation.generation import generate_greedily
from orchard.evaluation.loss import mean_loss
from orchard.evaluation.rouge import exact_match, rouge_l
from orchard.models.adapters import AdaptedModel

# Whether more is better.
METRICS = {"loss": False, "rouge_l": True, "exact_match": True}


@dataclass(frozen=True)
class TestExample:
    """A held-out example.

    Attributes:
        encoded: With labels, for the loss.
        reference: The right response, as text.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    encoded: Encoded
    reference: str


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how.

    Attributes:
        metrics: Of ``METRICS``.
        max_new_tokens: Longest generated answer.
        batch_size: Examples at a time.
    """

    metrics: tuple[str, ...]
    max_new_tokens: int
    batch_size: int


def evaluate(
    model: AdaptedModel, examples: Sequence[TestExample], settings: EvaluationSettings
) -> dict[str, float]:
    """Measure the model as it stands.

    Returns:
        Metric to value: ``loss`` in nats per response token, ``rouge_l`` (F1, stemmed) and
        ``exact_match`` as means in [0, 1].
    """
    values: dict[str, float] = {}
    if "loss" in settings.metrics:
        encoded = [example.encoded for example in examples]
        values["loss"] = mean_loss(model, encoded, batch_size=settings.batch_size)
    if {"rouge_l", "exact_match"} & set(settings.metrics):
        answers = generate_greedily(
            model,
            [example.encoded.prompt_ids for example in examples],
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )
        references = [example.reference for example in examples]
        if "rouge_l" in settings.metrics:
            values["rouge_l"] = fmean(rouge_l(answers, references))
        if "exact_match" in settings.metrics:
            values["exact_match"] = fmean(exact_match(answers, references))
    return values
