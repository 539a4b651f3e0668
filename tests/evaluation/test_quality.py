"""Loss and answers do not depend on who shares a batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from orchard.data.templates import Encoded
from orchard.evaluation.generation import generate_greedily
from orchard.evaluation.loss import forward_losses, mean_loss
from orchard.evaluation.quality import METRICS, EvaluationSettings, TestExample, evaluate
from orchard.models.trainable.adapters import AdaptedModel
from tiny_adapted import adapt, example_of, examples, stir

FAMILIES = ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"]
FREE_TEXT = (
    "loss",
    "rouge_l",
    "chrf",
    "exact_match",
)  # accuracy needs options: test_multiple_choice.py
SETTINGS = EvaluationSettings(metrics=FREE_TEXT, max_new_tokens=6, batch_size=3)


def stirred(family: str = "qwen2_moe") -> AdaptedModel:
    model = adapt(family)
    stir(model)
    return model


def prompts(num: int = 6) -> list[list[int]]:
    return [example_of(4 + 3 * (i % 4) + i, 3 + 2 * (i % 4), seed=i).prompt_ids for i in range(num)]


@torch.no_grad()
def continue_one(model: AdaptedModel, prompt: list[int], num: int) -> str:
    """Decode greedily by hand, without batch, padding or cache."""
    ids = list(prompt)
    for _ in range(num):
        logits = model.model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    return " ".join(str(i) for i in ids[len(prompt) :] if i > 2)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_batches_are_the_answers_one_by_one(family: str, batch_size: int) -> None:
    model = stirred(family)
    expected = [continue_one(model, prompt, 6) for prompt in prompts()]
    assert len(set(expected)) > 2
    found = generate_greedily(model, prompts(), max_new_tokens=6, batch_size=batch_size)
    assert found == expected


def test_an_answer_ends_with_the_end_token_and_leaves_it_out() -> None:
    model = stirred()
    (prompt, *_) = prompts()
    long = continue_one(model, prompt, 8).split()
    end = next(token for token in long[1:] if token != long[0])
    model.tokenizer.eos_token_id = int(end)
    (answer,) = generate_greedily(model, [prompt], max_new_tokens=8, batch_size=1)
    assert answer.split() == [*long[: long.index(end)], end]


def test_no_prompt_has_no_answer() -> None:
    assert generate_greedily(stirred(), [], max_new_tokens=4, batch_size=2) == []


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
def test_the_mean_loss_is_per_token_whatever_the_batches(batch_size: int) -> None:
    model, data = stirred(), examples(8)
    with torch.no_grad():
        losses = [forward_losses(model, [example])[0].double() for example in data]
    expected = float(torch.cat(losses).mean())
    assert mean_loss(model, data, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    mean_of_means = math.fsum(float(loss.mean()) for loss in losses) / len(losses)
    assert abs(mean_of_means - expected) > 1e-3 * expected


def test_the_mean_loss_does_not_depend_on_the_order() -> None:
    model, data = stirred(), examples(8)
    expected = mean_loss(model, data, batch_size=3)
    assert mean_loss(model, data[::-1], batch_size=3) == pytest.approx(expected, rel=1e-6)


def test_evaluation_leaves_no_gradients_and_changes_nothing() -> None:
    model = stirred()
    before = model.read(model.adapter_names)
    evaluate(model, held_out(), SETTINGS)
    after = model.read(model.adapter_names)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.model.parameters())


def held_out(num: int = 4) -> list[TestExample]:
    return [TestExample(example, reference="3 4 5") for example in examples(num)]


@pytest.mark.parametrize("metrics", [("loss",), ("rouge_l",), ("exact_match", "loss"), FREE_TEXT])
def test_what_is_asked_for_is_measured_and_nothing_else(metrics: tuple[str, ...]) -> None:
    values = evaluate(stirred(), held_out(), replace(SETTINGS, metrics=metrics))
    assert set(values) == set(metrics)
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())


def test_a_loss_alone_generates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(AdaptedModel, "generate", refuse)
    evaluate(stirred(), held_out(), replace(SETTINGS, metrics=("loss",)))


def test_right_answers_match_exactly_and_wrong_ones_do_not() -> None:
    model = stirred()
    data = examples(4)
    answers = [continue_one(model, example.prompt_ids, 6) for example in data]
    right = [TestExample(e, f" {answer}\n") for e, answer in zip(data, answers, strict=True)]
    wrong = [TestExample(example, "xyz") for example in data]
    values = evaluate(model, right, SETTINGS)
    assert (values["exact_match"], values["rouge_l"]) == (1.0, 1.0)
    values = evaluate(model, wrong, SETTINGS)
    assert (values["exact_match"], values["rouge_l"]) == (0.0, 0.0)
    values = evaluate(model, [*right[:3], wrong[3]], SETTINGS)
    assert (values["exact_match"], values["rouge_l"]) == (0.75, 0.75)


def test_the_model_never_sees_the_response_it_is_asked_for() -> None:
    model, (example, *_) = stirred(), examples(1)
    other = Encoded(
        input_ids=[*example.prompt_ids, 9, 9, 2],
        labels=[*example.labels[: example.prompt_length], 9, 9, 2],
        prompt_length=example.prompt_length,
    )
    answer = continue_one(model, example.prompt_ids, 6)
    for encoded in (example, other):
        values = evaluate(model, [TestExample(encoded, answer)], SETTINGS)
        assert values["exact_match"] == 1.0


def test_every_metric_says_whether_more_is_better() -> None:
    assert {name for name, is_more in METRICS.items() if not is_more} == {"loss"}
