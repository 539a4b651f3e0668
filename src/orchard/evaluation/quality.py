"""How good a model is on held-out examples: loss, answers against references, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TypeAlias

from orchard.data.encoded import Encoded
from orchard.evaluation.generation import generate_greedily
from orchard.evaluation.last_number import last_number
from orchard.evaluation.loss import mean_loss
from orchard.evaluation.multiple_choice import LengthNormalization, choose, standard_error
from orchard.evaluation.rouge import chrf, exact_match, rouge_l
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.factored import factored_experts
from orchard.models.view.unbinding import unbound_experts

# Whether more is better.
METRICS = {
    "loss": False,
    "rouge_l": True,
    "chrf": True,
    "exact_match": True,
    "last_number": True,
    "accuracy": True,
}

# Those that generate, each from answers and references to a value for each example.
OF_ANSWERS: Mapping[str, Callable[[Sequence[str], Sequence[str]], Sequence[float]]] = {
    "rouge_l": rouge_l,
    "chrf": chrf,
    "exact_match": exact_match,
    "last_number": last_number,
}

# What a model is measured on, to what is before the name of a metric then.
TESTED_ON: Mapping[str, str] = {"test": "", "retention": "retention_", "others": "others_"}


# Before the name of a metric, and before that: of clients that arrived after training.
ARRIVING = "arriving_"


def plain_metric(name: str) -> str:
    """Return the metric of a name, whatever it was measured on."""
    name = name.removeprefix(ARRIVING)
    for prefix in TESTED_ON.values():
        if prefix and name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def tested_on(name: str) -> str:
    """Return what a metric of this name was measured on, of ``TESTED_ON``."""
    prefix = name.removeprefix(ARRIVING).removesuffix(plain_metric(name))
    return next(of for of, own in TESTED_ON.items() if own == prefix)


# Behind the name of a metric: its standard error, which is no metric of its own.
STDERR = "_stderr"


@dataclass(frozen=True)
class TestExample:
    """A held-out example.

    Attributes:
        encoded: With labels, for the loss.
        reference: The right response, as text.
        options: The example with each of its options as the response; empty = it has none.
        answer: The index of the right option; 0 where there is none.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    encoded: Encoded
    reference: str
    options: tuple[Encoded, ...] = ()
    answer: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model generated for one held-out example: private text.

    Attributes:
        prompt: What it was asked, without special tokens.
        answer: What it generated.
        reference: The right response.
        scores: Of the metrics that look at answers, in [0, 1].
    """

    prompt: str
    answer: str
    reference: str
    scores: Mapping[str, float]


KeepAnswers: TypeAlias = Callable[[Sequence[Answer]], None]
"""Takes the answers to all examples, in their order."""

KeepScores: TypeAlias = Callable[[Mapping[str, Sequence[float]]], None]
"""Takes by metric the scores of all examples, in their order: of ``loss`` sums over tokens, whose
numbers are ``num_tokens``, of ``accuracy`` 1 where the right option is the likeliest."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured, and how.

    Attributes:
        metrics: Of ``METRICS``.
        max_new_tokens: Longest generated answer.
        batch_size: Examples at a time; for ``accuracy``, each with all its options.
        length_normalization: Of ``accuracy``, see ``multiple_choice.choose``.
        keeps_answers: Whether a client keeps what is generated, in its own folder.
        end_ids: The tokens that end an answer; empty = the tokenizer's end token.
    """

    metrics: tuple[str, ...]
    max_new_tokens: int
    batch_size: int
    length_normalization: LengthNormalization = "none"
    keeps_answers: bool = False
    end_ids: tuple[int, ...] = ()


def evaluate(
    model: AdaptedModel,
    examples: Sequence[TestExample],
    settings: EvaluationSettings,
    *,
    keep: KeepAnswers | None = None,
    note: KeepScores | None = None,
) -> dict[str, float]:
    """Measure the model as it stands.

    Args:
        model: The model.
        examples: What it is measured on; texts alone have a loss and no other metric.
        settings: What is measured, and how.
        keep: Called with the answers, where any are generated.
        note: Called with the scores of each example.

    Returns:
        Metric to value: ``loss`` in nats per learned token, ``rouge_l`` (F1, stemmed), ``chrf``
        (chrF2), ``exact_match`` and ``last_number`` as means over examples, in [0, 1];
        ``accuracy``, the share of examples whose right option is the likeliest, with
        ``accuracy_stderr``, its standard error over examples.

    Raises:
        ValueError: ``accuracy`` is asked for, and an example has no options.
    """
    if examples and all(is_text(example) for example in examples):
        settings = replace(settings, metrics=tuple(m for m in settings.metrics if m == "loss"))
    with unbound_experts(model.view), factored_experts(model.view):
        return _evaluate(model, examples, settings, keep, note)


def is_text(example: TestExample) -> bool:
    """Say whether an example asks nothing: a text alone, which has a loss and no other metric."""
    return example.encoded.prompt_length == 0


def _evaluate(
    model: AdaptedModel,
    examples: Sequence[TestExample],
    settings: EvaluationSettings,
    keep: KeepAnswers | None,
    note: KeepScores | None,
) -> dict[str, float]:
    values: dict[str, float] = {}
    of_each: dict[str, Sequence[float]] = {}
    if "loss" in settings.metrics:
        encoded, sums = [example.encoded for example in examples], list[tuple[float, int]]()
        values["loss"] = mean_loss(model, encoded, batch_size=settings.batch_size, of_each=sums)
        of_each = {"loss": [s for s, _ in sums], "num_tokens": [n for _, n in sums]}
    wanted = [metric for metric in OF_ANSWERS if metric in settings.metrics]
    if wanted:
        prompts = [example.encoded.prompt_ids for example in examples]
        answers = generate_greedily(
            model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            end_ids=settings.end_ids,
        )
        references = [example.reference for example in examples]
        scores = {metric: OF_ANSWERS[metric](answers, references) for metric in wanted}
        values |= {metric: fmean(found) for metric, found in scores.items()}
        of_each |= scores
        if keep is not None:
            texts = model.tokenizer.batch_decode(prompts, skip_special_tokens=True)
            keep(
                [
                    Answer(prompt, answer, reference, {m: float(scores[m][i]) for m in wanted})
                    for i, (prompt, answer, reference) in enumerate(
                        zip(texts, answers, references, strict=True)
                    )
                ]
            )
    if "accuracy" in settings.metrics:
        check_options([example.options for example in examples])
        chosen = choose(
            model,
            [example.options for example in examples],
            batch_size=settings.batch_size,
            normalization=settings.length_normalization,
        )
        pairs = zip(chosen, examples, strict=True)
        right = [float(index == example.answer) for index, example in pairs]
        values["accuracy"] = fmean(right)
        of_each["accuracy"] = right
        values[f"accuracy{STDERR}"] = standard_error(values["accuracy"], len(examples))
    if note is not None:
        note(of_each)
    return values


def check_options(options: Sequence[Sequence[object]], *, whose: str = "examples") -> None:
    """Check that every example has options to choose from.

    Args:
        options: Of each example.
        whose: What the examples are called in the message.

    Raises:
        ValueError: One has none.
    """
    num_without = sum(not of_one for of_one in options)
    if num_without:
        raise ValueError(
            f"{whose} must all have options with accuracy in evaluation.metrics, got {num_without} "
            f"of {len(options)} without; give data.labels or data.options, or drop accuracy"
        )
