"""What one example can change in a step, and the noise over it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federations import build, quick_recipe
from orchard.client.client import Client
from orchard.client.clipping import Clipper
from orchard.client.private_training import (
    draw_private_batches,
    num_private_steps,
    private_gradients,
    train_privately,
)
from orchard.client.training import ExamplePrivacy
from orchard.communication.messages import LocalSettings
from orchard.evaluation.loss import forward_losses
from orchard.models.trainable.adapters import AdaptedModel
from orchard.seeding import Seeds

CLIP = 0.5


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[AdaptedModel, Client]]:
    recipe = quick_recipe("fedavg", "model.lora_dropout=0", "model.dtype=float32")
    _, clients, model, _ = build(recipe, tmp_path)
    generator = torch.Generator().manual_seed(0)
    # A fresh adapter's second factor is zero, and gives the first no gradient.
    model.load(
        {n: 0.05 * torch.randn(t.shape, generator=generator) for n, t in model.fresh.items()}
    )
    model.set_trainable(model.adapter_names)
    yield model, clients[0]
    model.set_trainable(())


def no_noise(name: str, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape)


def gradients(
    model: AdaptedModel, rows: list[Any], *, clip: float = CLIP
) -> dict[str, torch.Tensor]:
    leaves = model.leaves(model.adapter_names)
    private_gradients(
        Clipper(model, leaves, clip=clip),
        leaves,
        rows,
        privacy=ExamplePrivacy(noise=1.0, clip=clip, random="seed"),
        expected=2.0,
        step=0,
        draw=no_noise,
    )
    return {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}


def norm(tree: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tree.values()))


@pytest.mark.parametrize("clip", [1e-3, 0.1, 10.0])
def test_an_example_changes_the_gradient_by_at_most_the_norm(
    opened: tuple[AdaptedModel, Client], clip: float
) -> None:
    model, client = opened
    rows = list(client.train[:4])
    with_it, without = gradients(model, rows, clip=clip), gradients(model, rows[1:], clip=clip)
    changed = norm({name: with_it[name] - without[name] for name in with_it})
    assert 0 < changed <= clip / 2.0 * (1 + 1e-4)


def test_a_wide_norm_gives_the_plain_gradients_of_each_example(
    opened: tuple[AdaptedModel, Client],
) -> None:
    model, client = opened
    rows = list(client.train[:3])
    found = gradients(model, rows, clip=1e6)
    leaves = model.leaves(model.adapter_names)
    expected = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for row in rows:
        losses_T, _ = forward_losses(model, [row], with_router_loss=False, packed=True)
        torch.autograd.backward(losses_T.mean())
        model.hand_gradients(leaves, leaves.keys())
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            expected[name] += leaf.grad / 2.0
        model.drop_gradients()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_a_step_almost_without_examples_is_noise_alone(
    opened: tuple[AdaptedModel, Client],
) -> None:
    model, client = opened
    settings = replace(
        client.training,
        privacy=ExamplePrivacy(noise=2.0, clip=CLIP, random="system"),
        optimizer="sgd",
        max_grad_norm=0.0,
        batch_size=1,
        grad_accumulation=1,
    )
    before = model.read(model.adapter_names)
    report = train_privately(
        model,
        [client.train[0]] * 10_000,  # of which one is expected in a step
        names=model.adapter_names,
        settings=settings,
        local=LocalSettings(steps=1, epochs=0, learning_rate=1.0),
        seeds=Seeds(0),
        turn=(1, "a"),
        dropout_seed=0,
    )
    after = model.read(model.adapter_names)
    moved = torch.cat([(after[n] - before[n]).flatten() for n in before]).double()
    # Each example adds a vector of at most the norm to noise of twice the norm in every direction.
    slack = report.num_examples * CLIP / math.sqrt(len(moved))
    assert float(moved.std()) == pytest.approx(2.0 * CLIP, rel=0.03, abs=slack)


def test_batches_are_drawn_example_by_example() -> None:
    local = LocalSettings(steps=500, epochs=0, learning_rate=0.0)
    drawn = list(
        draw_private_batches(20, expected=5, local=local, generator=np.random.default_rng(0))
    )
    assert len(drawn) == 500
    assert {len(batch) for batch in drawn} >= {2, 5, 8}
    for example in range(20):  # 125 are expected; 65 or 185 are 6 deviations off
        assert 65 < sum(example in batch for batch in drawn) < 185
    passes = LocalSettings(steps=0, epochs=3, learning_rate=0.0)
    assert num_private_steps(21, expected=5, local=passes) == 15
