"""Local training: what is read, what moves, and by how much."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchard import trees
from orchard.client.objectives import Objective, Situation, causal_lm, proximal
from orchard.client.training import (
    TrainingReport,
    TrainingSettings,
    _passes,
    draw_batches,
    num_steps_before_last_epoch,
    train,
)
from orchard.communication.messages import LocalSettings
from orchard.data.templates import Encoded
from orchard.evaluation.loss import forward_losses
from orchard.models.trainable.adapters import AdaptedModel
from tiny_adapted import adapt, example_of, examples, stir

SETTINGS = TrainingSettings(
    batch_size=2,
    grad_accumulation=2,
    optimizer="sgd",
    weight_decay=0.0,
    max_grad_norm=0.0,
    router_aux_coefficient=0.0,
)
LOCAL = LocalSettings(steps=3, epochs=0, learning_rate=0.05)
EPOCHS = LocalSettings(steps=0, epochs=1, learning_rate=0.05)
FAMILIES = ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "deepseek_moe_16b"]


def run(
    model: AdaptedModel,
    *,
    data: list[Encoded] | None = None,
    shared: list[str] | None = None,
    personal: tuple[str, ...] = (),
    objective: Objective = causal_lm,
    settings: TrainingSettings = SETTINGS,
    local: LocalSettings = LOCAL,
    seed: int = 0,
    dropout_seed: int = 0,
    **options: Any,
) -> TrainingReport:
    return train(
        model,
        examples() if data is None else data,
        shared=list(model.adapter_names) if shared is None else shared,
        personal=personal,
        objective=objective,
        memory={},
        broadcast={},
        settings=settings,
        local=local,
        generator=np.random.default_rng(seed),
        dropout_seed=dropout_seed,
        **options,
    )


def trained(**options: Any) -> tuple[dict[str, torch.Tensor], TrainingReport]:
    """Train a model of its own and return its adapters."""
    model = adapt(dropout=options.pop("dropout", 0.0))
    stir(model)
    report = run(model, **options)
    return model.read(model.adapter_names), report


def batches(num: int, settings: TrainingSettings, local: LocalSettings) -> list[list[list[int]]]:
    return list(draw_batches(num, settings, local, np.random.default_rng(0)))


sizes = st.builds(
    lambda size, accumulation: replace(SETTINGS, batch_size=size, grad_accumulation=accumulation),
    st.integers(1, 5),
    st.integers(1, 4),
)


@given(num=st.integers(1, 40), steps=st.integers(1, 12), settings=sizes)
def test_steps_are_as_many_and_as_large_as_asked_for(
    num: int, steps: int, settings: TrainingSettings
) -> None:
    drawn = batches(num, settings, LocalSettings(steps, 0, 0.1))
    assert len(drawn) == steps
    for step in drawn:
        assert [len(batch) for batch in step] == [settings.batch_size] * settings.grad_accumulation


@given(num=st.integers(1, 40), steps=st.integers(1, 12), settings=sizes)
def test_steps_read_everything_before_anything_twice(
    num: int, steps: int, settings: TrainingSettings
) -> None:
    drawn = batches(num, settings, LocalSettings(steps, 0, 0.1))
    order = [index for step in drawn for batch in step for index in batch]
    for start in range(0, len(order), num):
        part = order[start : start + num]
        assert len(set(part)) == len(part)
    counts = Counter(order)
    assert max(counts.values()) - min(counts[index] for index in range(num)) <= 1


@given(num=st.integers(1, 40), epochs=st.integers(1, 4), settings=sizes)
def test_epochs_read_everything_once_each_and_end_with_a_smaller_step(
    num: int, epochs: int, settings: TrainingSettings
) -> None:
    drawn = batches(num, settings, LocalSettings(0, epochs, 0.1))
    per_step = settings.batch_size * settings.grad_accumulation
    per_epoch = math.ceil(num / per_step)
    assert len(drawn) == epochs * per_epoch
    for epoch in range(epochs):
        steps = drawn[epoch * per_epoch : (epoch + 1) * per_epoch]
        sizes = [sum(map(len, step)) for step in steps]
        assert sizes == [per_step] * (per_epoch - 1) + [num - per_step * (per_epoch - 1)]
        assert sorted(i for step in steps for batch in step for i in batch) == list(range(num))
        assert all(0 < len(batch) <= settings.batch_size for step in steps for batch in step)


def test_the_last_pass_over_the_data_begins_after_all_others() -> None:
    # 7 examples in steps of 4: a pass is 2 steps.
    for local, before in (
        (LocalSettings(0, 3, 0.1), 4),
        (LocalSettings(0, 1, 0.1), 0),
        (LocalSettings(5, 0, 0.1), 3),
        (LocalSettings(2, 0, 0.1), 0),
        (LocalSettings(1, 0, 0.1), 0),
    ):
        assert num_steps_before_last_epoch(7, SETTINGS, local) == before


def test_epochs_have_different_orders() -> None:
    drawn = batches(20, SETTINGS, LocalSettings(0, 2, 0.1))
    assert drawn[:5] != drawn[5:]


def test_only_what_is_named_changes_or_needs_gradients() -> None:
    model = adapt(extra=("experts",))
    stir(model)
    shared = [name for name in model.adapter_names if "q_proj" in name]
    personal = tuple(n for n in model.adapter_names if "layers.1.experts" in n and "down" in n)
    chosen = {id(model._slots[name].parameter) for name in (*shared, *personal)}
    before, seen = model.read(model.adapter_names), []

    def watch(situation: Situation) -> torch.Tensor:
        needing = {id(p) for p in model.model.parameters() if p.requires_grad}
        seen.append(needing == chosen)
        assert list(situation.shared) == shared
        return situation.task_loss

    run(model, shared=shared, personal=personal, objective=watch)
    assert seen == [True] * 6
    after = model.read(model.adapter_names)
    for name in model.adapter_names:
        if name not in (*shared, *personal):
            assert torch.equal(before[name], after[name]), name
    assert all(not torch.equal(before[name], after[name]) for name in shared)
    assert any(not torch.equal(before[name], after[name]) for name in personal)
    assert trees.digest(model.base_state) == model.base_digest
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not model.model.training


def test_some_experts_of_a_layer_train_without_the_others() -> None:
    model = adapt(targets=("experts",))
    stir(model)
    before = model.read(model.adapter_names)
    named = [name for name in model.adapter_names if ".experts.3." in name]
    run(model, shared=named)
    after = model.read(model.adapter_names)
    others = [name for name in model.adapter_names if name not in named]
    assert all(torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_same_seeds_give_the_same_tensors(optimizer: str) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)
    options = {"settings": settings, "dropout": 0.3, "seed": 4, "dropout_seed": 9}
    (first, report), (second, again) = trained(**options), trained(**options)
    assert trees.equal(first, second)
    assert replace(report, seconds=0) == replace(again, seconds=0)
    assert not trees.equal(first, trained(**{**options, "dropout_seed": 10})[0])
    assert not trees.equal(first, trained(**{**options, "seed": 5})[0])


def test_dropout_neither_reads_nor_moves_global_randomness() -> None:
    expected, _ = trained(dropout=0.3)
    model = adapt(dropout=0.3)
    stir(model)
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        state = torch.get_rng_state()
        run(model)
        assert torch.equal(torch.get_rng_state(), state)
    assert trees.equal(model.read(model.adapter_names), expected)


@pytest.mark.parametrize("local", [LOCAL, EPOCHS], ids=["steps", "epochs"])
def test_accumulated_micro_batches_are_one_large_batch(local: LocalSettings) -> None:
    # Labels per example differ, so a mean of means would not do.
    results = [
        trained(local=local, settings=replace(SETTINGS, batch_size=size, grad_accumulation=n))
        for size, n in ((4, 1), (2, 2), (1, 4), (3, 1))
    ]
    (one, report), *others, (different, _) = results
    for tree, other in others:
        for name in one:
            # AdamW divides by what is all but zero, so that a kernel's rounding shows.
            torch.testing.assert_close(tree[name], one[name], rtol=1e-5, atol=1e-5)
        assert other.loss == pytest.approx(report.loss, rel=1e-5)
    assert any(not torch.allclose(one[name], different[name], atol=1e-4) for name in one)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", [{"packed": False}, {"pass_tokens": 0}, {"pass_tokens": 8}])
def test_how_rows_are_read_changes_nothing(options: dict[str, Any], dropout: float) -> None:
    own: dict[str, Any] = {"objective": proximal(causal_lm, mu=5.0), "dropout": dropout}
    one, report = trained(**own)
    tree, other = trained(**own, settings=replace(SETTINGS, **options))
    for name in one:
        torch.testing.assert_close(tree[name], one[name], rtol=1e-5, atol=1e-6)
    assert other.losses == pytest.approx(report.losses, rel=1e-5)
    assert (other.num_tokens, other.num_examples) == (report.num_tokens, report.num_examples)


@given(
    lengths=st.lists(st.lists(st.integers(3, 30), min_size=1, max_size=6), min_size=1, max_size=3),
    limit=st.integers(0, 60),
)
def test_passes_read_every_row_once_within_their_limit(
    lengths: list[list[int]], limit: int
) -> None:
    batches = [[example_of(length, 1) for length in batch] for batch in lengths]
    passes = list(_passes(batches, limit))
    assert [e for rows, _ in passes for e in rows] == [e for batch in batches for e in batch]
    assert sum(share for _, share in passes) == pytest.approx(1)
    if not limit:
        assert [rows for rows, _ in passes] == batches
    for rows, _ in passes:
        # A pass ends behind the row that fills it.
        assert not limit or sum(len(e.input_ids) for e in rows[:-1]) < limit


def test_a_batch_that_is_looked_at_is_read_in_one_pass() -> None:
    settings = replace(SETTINGS, batch_size=4, grad_accumulation=1, pass_tokens=8)
    for options, expected in (({}, 3), ({"watch": lambda: {}}, 1)):
        seen = []
        model = adapt()

        def note(situation: Situation, seen: list[float] = seen) -> torch.Tensor:
            seen.append(situation.share)
            return situation.task_loss

        one = replace(LOCAL, steps=1)
        run(model, objective=note, settings=settings, local=one, **options)
        assert len(seen) == expected
        assert sum(seen) == pytest.approx(1)


def test_the_report_has_the_loss_of_each_step() -> None:
    report = trained()[1]
    assert len(report.losses) == report.num_steps
    assert math.fsum(report.losses) / 3 == pytest.approx(report.loss)


def test_accumulation_weighs_terms_without_data_once_per_step() -> None:
    objective = proximal(causal_lm, mu=5.0)
    (one, _), (two, _) = (
        trained(
            objective=objective, settings=replace(SETTINGS, batch_size=size, grad_accumulation=n)
        )
        for size, n in ((4, 1), (1, 4))
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("local", [LOCAL, LocalSettings(0, 2, 0.1)], ids=["steps", "epochs"])
def test_the_shares_of_a_step_sum_to_1(local: LocalSettings) -> None:
    shares: list[float] = []

    def watch(situation: Situation) -> torch.Tensor:
        shares.append(situation.share)
        return situation.task_loss

    # 7 examples in steps of 3 micro-batches of 2: the last step of an epoch has one of 1
    settings = replace(SETTINGS, grad_accumulation=3)
    _, report = trained(data=examples(7), objective=watch, local=local, settings=settings)
    assert sum(shares) == pytest.approx(report.num_steps)


def test_the_anchor_is_where_training_started() -> None:
    model = adapt()
    stir(model)
    start, seen = model.read(model.adapter_names), []

    def watch(situation: Situation) -> torch.Tensor:
        seen.append(trees.equal(situation.anchor, start))
        return situation.task_loss

    run(model, objective=watch)
    assert seen == [True] * 6


def test_a_loss_that_is_not_finite_is_an_error_and_moves_nothing() -> None:
    model = adapt()
    stir(model)
    with torch.no_grad():
        model.model.lm_head.weight[5] = math.nan
    before = model.read(model.adapter_names)
    with pytest.raises(FloatingPointError, match=r"^loss must be finite, got nan in step 1; lower"):
        run(model)
    assert trees.equal(model.read(model.adapter_names), before)
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_an_error_leaves_the_model_ready_for_evaluation() -> None:
    def fail(situation: Situation) -> torch.Tensor:
        raise KeyboardInterrupt

    model = adapt()
    with pytest.raises(KeyboardInterrupt):
        run(model, objective=fail)
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_the_mean_gradient_is_the_way_walked_by_sgd() -> None:
    model = adapt(extra=("experts",))
    stir(model)
    before = model.read(model.adapter_names)
    report = run(model, objective=proximal(causal_lm, mu=0.5), keep_mean_gradient=True)
    after = model.read(model.adapter_names)
    assert report.mean_gradient is not None
    assert report.mean_gradient.keys() == before.keys()
    for name, gradient in report.mean_gradient.items():
        walked = (before[name] - after[name]) / (LOCAL.steps * LOCAL.learning_rate)
        torch.testing.assert_close(gradient, walked, rtol=1e-3, atol=2e-5)


def test_the_mean_gradient_is_only_kept_where_it_is_asked_for() -> None:
    assert trained()[1].mean_gradient is None


def test_the_mean_gradient_is_the_one_before_clipping() -> None:
    clipped = replace(SETTINGS, max_grad_norm=1e-3)
    one = replace(LOCAL, steps=1)
    options = {"local": one, "keep_mean_gradient": True}
    (_, free), (_, report) = trained(**options), trained(settings=clipped, **options)
    assert free.mean_gradient is not None
    assert report.mean_gradient is not None
    assert trees.equal(free.mean_gradient, report.mean_gradient)
    assert trees.squared_norm(report.mean_gradient) > 1e-4


def test_clipping_limits_a_step() -> None:
    model = adapt()
    stir(model)
    before = model.read(model.adapter_names)
    run(model, local=replace(LOCAL, steps=1), settings=replace(SETTINGS, max_grad_norm=0.01))
    delta = trees.subtract(model.read(model.adapter_names), before)
    assert math.sqrt(trees.squared_norm(delta)) == pytest.approx(0.01 * 0.05, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_lowers_the_loss(optimizer: str) -> None:
    settings = replace(SETTINGS, optimizer=optimizer)
    data = examples(4)
    _, short = trained(data=data, local=replace(LOCAL, steps=1), settings=settings)
    _, long = trained(data=data, local=replace(LOCAL, steps=25), settings=settings)
    assert long.loss < 0.9 * short.loss


def test_weight_decay_reaches_the_optimizer() -> None:
    local = replace(LOCAL, steps=1)
    (plain, _), (decayed, _) = (
        trained(local=local, settings=replace(SETTINGS, weight_decay=decay)) for decay in (0.0, 0.1)
    )
    model = adapt()
    stir(model)
    before = model.read(model.adapter_names)
    for name in plain:
        expected = plain[name] - local.learning_rate * 0.1 * before[name]
        torch.testing.assert_close(decayed[name], expected, rtol=1e-5, atol=1e-6)


def test_the_report_counts_what_was_read() -> None:
    data = examples(7)
    _, report = trained(data=data, local=LocalSettings(0, 2, 0.01))
    assert report.num_steps == 4
    assert report.num_examples == 14
    assert report.num_tokens == 2 * sum(len(example.input_ids) for example in data)
    assert 0 < report.seconds < 60


def test_the_reported_loss_is_the_mean_over_steps_per_token() -> None:
    model = adapt()
    stir(model)
    data = examples(8)
    still = replace(EPOCHS, learning_rate=0.0)
    report = run(model, data=data, local=still)
    steps = []
    for step in draw_batches(8, SETTINGS, still, np.random.default_rng(0)):
        chosen = [data[index] for batch in step for index in batch]
        with torch.no_grad():
            steps.append(float(forward_losses(model, chosen)[0].mean()))
    assert report.loss == pytest.approx(math.fsum(steps) / len(steps), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_counts_the_response_and_the_end_and_no_prompt(family: str) -> None:
    model = adapt(family)
    stir(model)
    example = example_of(9, 4)
    with torch.no_grad():
        losses_T, router_loss = forward_losses(model, [example])
        logits = model.model(input_ids=torch.tensor([example.input_ids])).logits[0]
    assert router_loss is None
    expected = [
        -float(logits[place - 1].float().log_softmax(-1)[example.input_ids[place]])
        for place in range(4, 9)
    ]
    assert example.input_ids[8] == model.tokenizer.eos_token_id
    assert losses_T.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_loss(family: str) -> None:
    model = adapt(family)
    stir(model)
    batch = [example_of(4, 2), example_of(11, 3), example_of(7, 1)]
    with torch.no_grad():
        together, _ = forward_losses(model, batch)
        alone = torch.cat([forward_losses(model, [example])[0] for example in batch])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_token_that_equals_the_padding_counts() -> None:
    model = adapt()
    model.tokenizer.pad_token_id = 2  # as for tokenizers that pad with the end
    with torch.no_grad():
        losses_T, _ = forward_losses(model, [example_of(4, 2), example_of(9, 2)])
    assert losses_T.numel() == (4 - 2) + (9 - 2)


def test_the_router_loss_is_the_models_own() -> None:
    model = adapt("qwen2_moe")
    with torch.no_grad():
        _, router_loss = forward_losses(model, examples(2), with_router_loss=True)
    assert router_loss is not None
    assert router_loss.item() > 0


def test_padding_is_not_in_the_router_loss() -> None:
    model, losses = adapt("qwen2_moe"), []
    for pad_id in (0, 17):
        model.tokenizer.pad_token_id = pad_id
        with torch.no_grad():
            batch = [example_of(4, 2), example_of(12, 2)]
            losses.append(forward_losses(model, batch, with_router_loss=True)[1])
    assert losses[0] is not None
    torch.testing.assert_close(losses[0], losses[1])


def test_a_model_without_a_router_loss_is_an_error_where_one_is_asked_for() -> None:
    settings = replace(SETTINGS, router_aux_coefficient=0.01)
    with pytest.raises(ValueError, match=r"^client\.router_aux_coefficient must be 0 for Listed"):
        run(adapt("deepseek_moe_16b"), settings=settings)


def test_the_router_loss_is_added_but_not_reported() -> None:
    local = replace(LOCAL, steps=1)
    settings = replace(SETTINGS, router_aux_coefficient=0.5)
    (plain, report), (other, same) = trained(local=local), trained(local=local, settings=settings)
    assert same.loss == pytest.approx(report.loss, rel=1e-6)
    assert any(not torch.allclose(plain[name], other[name], atol=1e-6) for name in plain)


def test_the_router_loss_moves_routers_that_are_not_sent() -> None:
    def routers(**options: Any) -> tuple[AdaptedModel, dict[str, torch.Tensor]]:
        model = adapt(extra=("router",))
        stir(model)
        personal = tuple(name for name in model.adapter_names if "router" in name)
        shared = [name for name in model.adapter_names if name not in personal]
        if options:
            run(model, data=data, shared=shared, personal=personal, local=one, **options)
        return model, model.read(personal)

    data, one = examples(4), replace(LOCAL, steps=1)
    with_loss = replace(SETTINGS, batch_size=4, grad_accumulation=1, router_aux_coefficient=0.5)
    without = replace(with_loss, router_aux_coefficient=0.0)
    (_, pulled), (_, plain) = routers(settings=with_loss), routers(settings=without)
    model, start = routers()
    model.set_trainable(start)
    _, router_loss = forward_losses(model, data, with_router_loss=True)
    assert router_loss is not None
    router_loss.backward()
    for name, gradient in model.gradients(start).items():
        assert gradient.any(), name
        expected = plain[name] - one.learning_rate * 0.5 * gradient
        torch.testing.assert_close(pulled[name], expected, rtol=1e-5, atol=1e-7)


def test_the_router_loss_is_the_mean_over_micro_batches() -> None:
    # Of equal batches, so that it is the same loss in one and in two.
    one = replace(LOCAL, steps=1)
    sizes = ((1, 1), (1, 3))
    results = [
        trained(
            data=[example_of(9, 4)],
            local=one,
            settings=replace(
                SETTINGS, batch_size=size, grad_accumulation=number, router_aux_coefficient=0.5
            ),
        )[0]
        for size, number in sizes
    ]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def test_a_step_holds_still_what_it_is_told_to() -> None:
    settings = replace(SETTINGS, optimizer="adamw", weight_decay=0.1)
    model = adapt()
    stir(model)
    held = frozenset(list(model.adapter_names)[::2])
    never = min(held)
    start = model.read(model.adapter_names)
    asked, seen = [], []

    def hold_still(batches: Any) -> frozenset[str]:
        asked.append([[len(example.input_ids) for example in batch] for batch in batches])
        seen.append(model.read(model.adapter_names))
        # In the first two of three steps; one name in all of them.
        return held if len(asked) < 3 else frozenset({never})

    report = run(model, settings=settings, hold_still=hold_still)
    end = model.read(model.adapter_names)
    assert [[len(batch) for batch in step] for step in asked] == [[2, 2]] * 3
    assert sum(sum(map(sum, step)) for step in asked) == report.num_tokens
    assert report.moved == frozenset(model.adapter_names) - {never}
    for name in model.adapter_names:
        is_still = [torch.equal(old[name], new[name]) for old, new in pairwise(seen)]
        assert is_still == [name in held] * 2, name
        assert torch.equal(seen[2][name], end[name]) == (name == never), name
    # The optimizer knows nothing of steps that were sat out: its first one has the size of lr.
    rate = LOCAL.learning_rate
    for name in held - {never}:
        moved = end[name] - start[name] * (1 - rate * 0.1)
        assert float(moved.abs().max()) == pytest.approx(rate, rel=1e-3)


def test_what_is_held_still_does_not_count_for_clipping() -> None:
    settings = replace(SETTINGS, max_grad_norm=0.01)
    model = adapt()
    stir(model)
    held = frozenset(list(model.adapter_names)[::2])
    before = model.read(model.adapter_names)
    one = replace(LOCAL, steps=1)
    run(model, local=one, settings=settings, hold_still=lambda batches: held)
    delta = trees.subtract(model.read(model.adapter_names), before)
    assert math.sqrt(trees.squared_norm(delta)) == pytest.approx(0.01 * 0.05, rel=1e-3)
