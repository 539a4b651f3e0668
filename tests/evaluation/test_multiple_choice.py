"""Options are chosen as one forward pass for each of them would choose."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from orchard.data.templates import IGNORED, Encoded
from orchard.evaluation.multiple_choice import choose, log_likelihoods, standard_error
from orchard.evaluation.quality import EvaluationSettings, TestExample, evaluate
from orchard.models.trainable.adapters import AdaptedModel
from tiny_adapted import adapt, stir

END = 2
FAMILIES = ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"]
SETTINGS = EvaluationSettings(metrics=("accuracy",), max_new_tokens=4, batch_size=3)

# What options of a question may look like: one token each; some longer; equal beginnings; an
# option that begins another.
ANSWERS = (
    ((5,), (6,), (7,), (8,)),
    ((5, 6), (9, 8, 7), (11,)),
    ((5, 6, 7), (5, 6, 8), (5, 9)),
    ((5,), (5, 6), (5, 6, 7)),
    ((12, 13, 14, 15, 16), (17,)),
)


def stirred(family: str = "qwen2_moe") -> AdaptedModel:
    model = adapt(family)
    stir(model)
    return model


def option(prompt: Sequence[int], answer: Sequence[int], *, ends: bool = True) -> Encoded:
    ids = [*answer, END] if ends else list(answer)
    return Encoded([*prompt, *ids], [IGNORED] * len(prompt) + ids, prompt_length=len(prompt))


def questions(num: int = 10) -> list[tuple[Encoded, ...]]:
    """Return questions whose prompts have different lengths, with every kind of options."""
    generator = np.random.default_rng(3)
    made = []
    for number in range(num):
        prompt = generator.integers(3, 60, size=2 + (5 * number) % 11).tolist()
        answers = ANSWERS[number % len(ANSWERS)]
        made.append(tuple(option(prompt, answer) for answer in answers))
    return made


@torch.no_grad()
def score_one(model: AdaptedModel, encoded: Encoded) -> float:
    """Score one option by hand: no batch, no padding, no end token, nothing shared."""
    ids = [i for i in encoded.input_ids if i != END]
    logits = model.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(logits[at - 1, ids[at]] for at in range(encoded.prompt_length, len(ids))))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_options_in_batches_score_as_one_by_one(family: str, batch_size: int) -> None:
    model = stirred(family)
    found = log_likelihoods(model, questions(), batch_size=batch_size)
    for scores, options in zip(found, questions(), strict=True):
        assert scores == pytest.approx([score_one(model, o) for o in options], abs=2e-4)


@pytest.mark.parametrize("normalization", ["none", "tokens"])
def test_the_likeliest_option_is_chosen(normalization: str) -> None:
    model = stirred()
    expected = []
    for options in questions(20):
        scores = [score_one(model, o) for o in options]
        if normalization == "tokens":
            lengths = [len(o.input_ids) - o.prompt_length - 1 for o in options]
            scores = [s / n for s, n in zip(scores, lengths, strict=True)]
        expected.append(int(np.argmax(scores)))
    found = choose(model, questions(20), batch_size=7, normalization=normalization)  # type: ignore[arg-type]
    assert found == expected
    assert len(set(found)) > 2


def test_normalization_changes_what_is_chosen() -> None:
    model, data = stirred(), questions(20)
    plain = choose(model, data, batch_size=8)
    assert plain != choose(model, data, batch_size=8, normalization="tokens")


def test_permuting_options_permutes_the_choice() -> None:
    model, data = stirred(), questions(10)
    generator = np.random.default_rng(0)
    chosen = choose(model, data, batch_size=4)
    orders = [generator.permutation(len(options)).tolist() for options in data]
    permuted = [[o[i] for i in order] for o, order in zip(data, orders, strict=True)]
    again = choose(model, permuted, batch_size=4)
    assert [order[i] for order, i in zip(orders, again, strict=True)] == chosen


def test_of_equal_options_the_first_is_chosen() -> None:
    model = stirred()
    twice = [option([4, 5, 6], (7,)), option([4, 5, 6], (7,))]
    assert choose(model, [twice], batch_size=1) == [0]


def test_an_option_that_begins_another_never_scores_below_it() -> None:
    """The price of leaving the end token out."""
    options = [option([4, 5], (5, 6, 7)), option([4, 5], (5, 6))]
    (scores,) = log_likelihoods(stirred(), [options], batch_size=2)
    assert scores[1] > scores[0]


def test_the_end_token_does_not_count_and_a_cut_option_has_none() -> None:
    model = stirred()
    with_end, without = option([4, 5], (5, 6)), option([4, 5], (5, 6), ends=False)
    ((a, b),) = log_likelihoods(model, [[with_end, without]], batch_size=2)
    assert a == b


@pytest.mark.parametrize(
    ("family", "answers", "shapes"),
    [
        ("qwen2_moe", ANSWERS[0], [(1, 3)]),
        ("qwen2_moe", ANSWERS[2], [(1, 5)]),
        # What follows the prompt is read behind it: the first tokens of the longer two.
        ("qwen2_moe", ANSWERS[1], [(1, 3), (2, 2)]),
        # A window over the prompt would count its padding: whole rows, once that was seen.
        ("gpt_oss", ANSWERS[1], [(1, 3), (2, 5)]),
    ],
)
def test_options_share_forward_passes(
    family: str,
    answers: Sequence[Sequence[int]],
    shapes: list[tuple[int, int]],
) -> None:
    model, seen = stirred(family), []
    model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    log_likelihoods(model, [[option([4, 5, 6], a) for a in answers]], batch_size=8)
    assert seen == shapes


def test_a_model_that_cannot_leave_out_logits_scores_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = stirred()
    expected = log_likelihoods(model, questions(), batch_size=4)
    real = model.model.forward

    def forward(**inputs: object) -> object:
        assert "logits_to_keep" not in inputs
        return real(**inputs)

    known = inspect.signature(real)
    rest = [one for name, one in known.parameters.items() if name != "logits_to_keep"]
    forward.__signature__ = known.replace(parameters=rest)  # type: ignore[attr-defined]
    monkeypatch.setattr(model.model, "forward", forward)
    found = log_likelihoods(model, questions(), batch_size=4)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_no_question_has_no_choice() -> None:
    assert choose(stirred(), [], batch_size=4) == []


def test_the_standard_error_of_a_worked_number() -> None:
    # 80 of 100 right: sqrt(0.8 * 0.2 / 100).
    assert standard_error(0.8, 100) == pytest.approx(0.04)
    right = np.array([1] * 80 + [0] * 20)
    assert standard_error(0.8, 100) == pytest.approx(right.std() / math.sqrt(100))
    assert standard_error(1.0, 1) == 0.0


def test_accuracy_is_the_share_of_right_choices_with_its_standard_error() -> None:
    model, data = stirred(), questions(10)
    chosen = choose(model, data, batch_size=3)
    right = [
        TestExample(options[0], "", options=options, answer=index)
        for options, index in zip(data, chosen, strict=True)
    ]
    assert evaluate(model, right, SETTINGS) == {"accuracy": 1.0, "accuracy_stderr": 0.0}
    wrong = [replace(e, answer=(e.answer + 1) % len(e.options)) for e in right]
    assert evaluate(model, wrong, SETTINGS)["accuracy"] == 0.0
    values = evaluate(model, [*right[:6], *wrong[6:]], SETTINGS)
    assert values["accuracy"] == pytest.approx(0.6)
    assert values["accuracy_stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 10))


def test_accuracy_without_options_is_an_error() -> None:
    (options, *_) = questions(1)
    data = [TestExample(options[0], "5", options=options), TestExample(options[0], "5")]
    with pytest.raises(ValueError, match=r"examples must all have options .* got 1 of 2 without"):
        evaluate(stirred(), data, SETTINGS)
