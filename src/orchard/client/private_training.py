"""Example-level differential privacy: DP-SGD, in the place of the ordinary step.

Abadi et al., 2016, arXiv:1607.00133. In a step each example is in the batch by itself, with the
same probability (Poisson sampling); the gradient of each is scaled down to a norm over all trained
names, the gradients are added, Gaussian noise is added to every name, and the sum is divided by the
expected size of a batch. Whatever is made of such gradients later costs nothing more, so what a
client keeps is covered as well as what it sends.

The gradients of a batch's examples come from one pass over all of them where the model lets them be
told apart, see ``client.clipping``.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from orchard.client.clipping import Clipper
from orchard.client.training import (
    ExamplePrivacy,
    TrainingReport,
    TrainingSettings,
    check_finite,
    make_optimizer,
)
from orchard.communication.messages import LocalSettings
from orchard.data.encoded import Encoded
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.dropout import dropout_by_row
from orchard.models.view.unbinding import unbound_experts
from orchard.process_memory import release_freed_memory
from orchard.seeding import Seeds, system_normal

DrawNoise: TypeAlias = Callable[[str, int, tuple[int, ...]], Tensor]
"""From name, step and shape to independent standard normal values in float32."""


def draw_private_batches(
    num_examples: int, *, expected: int, local: LocalSettings, generator: np.random.Generator
) -> Iterator[list[int]]:
    """Yield the examples of each step; a batch has ``expected`` of them only on average.

    Args:
        num_examples: That the client has.
        expected: Size of a batch; all examples are in every batch where there are no more.
        local: Steps of the round, or passes over the data, each of as many steps as ordinary ones.
        generator: Draws.
    """
    rate = sampling_rate(num_examples, expected)
    for _ in range(num_private_steps(num_examples, expected=expected, local=local)):
        drawn = generator.random(num_examples) < rate
        yield [int(index) for index in np.flatnonzero(drawn)]


def sampling_rate(num_examples: int, expected: int) -> float:
    """Return the probability with which an example is in a step."""
    return min(1.0, expected / num_examples)


def num_private_steps(num_examples: int, *, expected: int, local: LocalSettings) -> int:
    """Return the steps of a round."""
    return local.steps or local.epochs * -(-num_examples // expected)


def private_gradients(
    clipper: Clipper,
    leaves: Mapping[str, nn.Parameter],
    batch: Sequence[Encoded],
    *,
    privacy: ExamplePrivacy,
    expected: float,
    step: int,
    draw: DrawNoise,
) -> float:
    """Give the leaves the noisy mean gradient of a batch, which may be empty.

    Args:
        clipper: Adds up the gradients of examples, clipped.
        leaves: Name to what the optimizer steps on.
        batch: Examples.
        privacy: Norm and noise.
        expected: Expected number of examples.
        step: Of the round, for the noise.
        draw: The noise.

    Returns:
        The mean loss of the batch in nats per response token, NaN where it is empty. It has no
        noise on it.
    """
    sums, total, num_labels = clipper.sum_of(batch)
    for name, leaf in leaves.items():
        noise = draw(name, step, tuple(leaf.shape)).to(leaf.device)
        leaf.grad = (sums[name].add_(noise, alpha=privacy.noise * privacy.clip) / expected).to(
            leaf.dtype
        )
    return total / num_labels if num_labels else math.nan


def train_privately(
    model: AdaptedModel,
    examples: Sequence[Encoded],
    *,
    names: Sequence[str],
    settings: TrainingSettings,
    local: LocalSettings,
    seeds: Seeds,
    turn: tuple[str | int, ...],
    dropout_seed: int,
) -> TrainingReport:
    """Train the named tensors from their present values, in place, by DP-SGD.

    Args:
        model: The model, with global and personal values loaded.
        examples: The client's training examples; how many there are is no secret.
        names: What is trained, to be sent or to stay.
        settings: Of the recipe, with privacy.
        local: Of the task.
        seeds: Draw batches and noise where ``privacy.random`` is ``seed``.
        turn: What tells this training from all others, such as round and client.
        dropout_seed: For dropout.

    Raises:
        FloatingPointError: A value after the last step is NaN or infinite.
    """
    assert settings.privacy is not None
    started = time.monotonic()
    model.set_trainable(names)
    leaves = model.leaves(names)
    optimizer = make_optimizer(leaves, settings, local)
    expected = settings.batch_size * settings.grad_accumulation
    generator, draw = _sources(settings.privacy, seeds, turn)
    losses: list[float] = []
    num_tokens = num_examples = num_steps = 0
    model.model.train()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            unbound_experts(model.view),
            dropout_by_row(model.model, seed=dropout_seed),
        ):
            torch.manual_seed(dropout_seed)
            pass_tokens = settings.pass_tokens
            clipper = Clipper(model, leaves, clip=settings.privacy.clip, pass_tokens=pass_tokens)
            for batch in draw_private_batches(
                len(examples), expected=expected, local=local, generator=generator
            ):
                rows = [examples[index] for index in batch]
                loss = private_gradients(
                    clipper,
                    leaves,
                    rows,
                    privacy=settings.privacy,
                    expected=sampling_rate(len(examples), expected) * len(examples),
                    step=num_steps,
                    draw=draw,
                )
                if settings.max_grad_norm > 0:
                    torch.nn.utils.clip_grad_norm_(leaves.values(), settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                num_steps += 1
                num_examples += len(rows)
                num_tokens += sum(len(row.input_ids) for row in rows)
                if rows:
                    losses.append(loss)
        check_finite(leaves, num_steps)
    finally:
        model.drop_gradients()
        model.model.eval()
        model.set_trainable(())
        release_freed_memory()
    return TrainingReport(
        loss=math.fsum(losses) / len(losses) if losses else 0.0,
        num_steps=num_steps,
        num_tokens=num_tokens,
        num_examples=num_examples,
        seconds=time.monotonic() - started,
        moved=frozenset(names),
        mean_gradient=None,
        losses=tuple(losses),
    )


def _sources(
    privacy: ExamplePrivacy, seeds: Seeds, turn: tuple[str | int, ...]
) -> tuple[np.random.Generator, DrawNoise]:
    """Return what draws batches and noise: from the system, or from the recipe's seed."""
    if privacy.random == "system":
        generator = np.random.Generator(np.random.PCG64(secrets.randbits(128)))
        return generator, lambda name, step, shape: torch.from_numpy(system_normal(shape))

    def draw(name: str, step: int, shape: tuple[int, ...]) -> Tensor:
        own = seeds.generator("private noise", *turn, step, name)
        return torch.from_numpy(np.asarray(own.standard_normal(shape, np.float32)))

    return seeds.generator("private batches", *turn), draw
