"""Local training: the same loop for every method, steered by names and an objective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from orchard.client.objectives import Objective, Situation, causal_lm
from orchard.communication.messages import LocalSettings
from orchard.data.encoded import Encoded
from orchard.evaluation.loss import forward_losses
from orchard.models.kernels import waiting
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.dropout import dropout_by_row
from orchard.models.trainable.factored import factored_experts
from orchard.models.view.unbinding import unbound_experts
from orchard.process_memory import release_freed_memory
from orchard.trees import Tree, clone, zeros_like

HoldStill: TypeAlias = Callable[[Sequence[Sequence[Encoded]]], Collection[str]]
"""Given the micro-batches of one optimizer step, the names that the step must not move."""


@dataclass(frozen=True)
class ExamplePrivacy:
    """What is done to the gradients of a step, see ``client.private_training``.

    Attributes:
        noise: Standard deviation over ``clip``.
        clip: L2 norm of one example's gradient, over all trained names.
        random: ``system`` or ``seed``, where noise and batches come from.
    """

    noise: float
    clip: float
    random: str


@dataclass(frozen=True)
class TrainingSettings:
    """How every client trains, in every round.

    Attributes:
        batch_size: Examples per micro-batch.
        grad_accumulation: Micro-batches per optimizer step.
        optimizer: ``adamw`` or ``sgd``, made anew each round.
        weight_decay: Of the optimizer.
        max_grad_norm: Gradients are scaled down to this L2 norm; 0 = never.
        router_aux_coefficient: Weight of the model's load-balancing loss; 0 = off.
        packed: Whether micro-batches are read without padding, where the model can (see
            ``models.kernels.packing``); else padded to the longest row.
        pass_tokens: On a CPU, a packed micro-batch with more tokens is read in several passes,
            which needs less memory; 0 = never.
        privacy: What protects each example; None = nothing does.
    """

    batch_size: int
    grad_accumulation: int
    optimizer: str
    weight_decay: float
    max_grad_norm: float
    router_aux_coefficient: float
    packed: bool = True
    pass_tokens: int = 512
    privacy: ExamplePrivacy | None = None


@dataclass(frozen=True)
class TrainingReport:
    """What local training was.

    Attributes:
        loss: Mean over steps of the task loss, nats per response token.
        num_steps: Optimizer steps.
        num_tokens: Tokens read, padding not counted.
        num_examples: Examples read, repeats counted.
        seconds: Wall time.
        moved: Names that at least one step might move.
        mean_gradient: Mean over steps of the objective's gradient before clipping, of the shared
            names; None where it was not asked for.
        losses: The task loss of each step, of which ``loss`` is the mean.
    """

    loss: float
    num_steps: int
    num_tokens: int
    num_examples: int
    seconds: float
    moved: frozenset[str]
    mean_gradient: Tree | None
    losses: tuple[float, ...] = ()


def draw_batches(
    num_examples: int,
    settings: TrainingSettings,
    local: LocalSettings,
    generator: np.random.Generator,
) -> Iterator[list[list[int]]]:
    """Yield the micro-batches of each optimizer step, as indices of examples.

    With ``local.steps``, examples come from one random order after another, so that none repeats
    before all were seen. With ``local.epochs``, every pass is one random order, and its last step
    may be smaller.
    """
    per_step = settings.batch_size * settings.grad_accumulation
    if local.steps:
        needed = local.steps * per_step
        orders = [generator.permutation(num_examples) for _ in range(-(-needed // num_examples))]
        passes = [np.concatenate(orders)[:needed]]
    else:
        passes = [generator.permutation(num_examples) for _ in range(local.epochs)]
    for order in passes:
        for start in range(0, len(order), per_step):
            step = [int(index) for index in order[start : start + per_step]]
            size = settings.batch_size
            yield [step[first : first + size] for first in range(0, len(step), size)]


def _passes(
    batches: Sequence[Sequence[Encoded]], pass_tokens: int
) -> Iterator[tuple[Sequence[Encoded], float]]:
    """Yield what is read in one forward pass, and its part of the optimizer step by tokens."""
    of_step = sum(len(example.input_ids) for batch in batches for example in batch)
    for batch in batches:
        num_tokens = sum(len(example.input_ids) for example in batch)
        num_passes = -(-num_tokens // pass_tokens) if pass_tokens else 1
        rows: list[Encoded] = []
        read = done = 0
        for index, example in enumerate(batch):
            rows.append(example)
            read += len(example.input_ids)
            # About evenly: a pass ends where its part of the tokens is read.
            if read * num_passes >= num_tokens * (done + 1) or index == len(batch) - 1:
                yield rows, sum(len(one.input_ids) for one in rows) / of_step
                rows, done = [], read * num_passes // num_tokens


def num_steps_before_last_epoch(
    num_examples: int, settings: TrainingSettings, local: LocalSettings
) -> int:
    """Return how many optimizer steps a round has before its last pass over the data begins.

    0 where a round is one pass or less.
    """
    per_epoch = -(-num_examples // (settings.batch_size * settings.grad_accumulation))
    num_steps = local.steps or local.epochs * per_epoch
    return max(0, num_steps - per_epoch)


def make_optimizer(
    leaves: Mapping[str, torch.nn.Parameter], settings: TrainingSettings, local: LocalSettings
) -> torch.optim.Optimizer:
    """Return a round's optimizer, without any state."""
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
    return kind(leaves.values(), lr=local.learning_rate, weight_decay=settings.weight_decay)


def _check_loss(loss: float, *, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"loss must be finite, got {loss} in step {step}; lower client.lr")


def check_finite(leaves: Mapping[str, torch.nn.Parameter], num_steps: int) -> None:
    """Refuse what training ends in: a last step has no loss after it that would show it.

    Raises:
        FloatingPointError: A value is NaN or infinite.
    """
    for name, leaf in leaves.items():
        if not bool(leaf.isfinite().all()):
            raise FloatingPointError(
                f"trained values must be finite, got NaN or infinity in {name} after step "
                f"{num_steps}; lower client.lr"
            )


def train(
    model: AdaptedModel,
    examples: Sequence[Encoded],
    *,
    shared: Sequence[str],
    personal: Sequence[str],
    objective: Objective,
    memory: Tree,
    broadcast: Tree,
    settings: TrainingSettings,
    local: LocalSettings,
    generator: np.random.Generator,
    dropout_seed: int,
    keep_mean_gradient: bool = False,
    hold_still: HoldStill | None = None,
    watch: Callable[[], Tree] = dict,
) -> TrainingReport:
    """Train the named tensors from their present values, in place.

    Args:
        model: The model, with global and personal values loaded.
        examples: The client's training examples.
        shared: Names that will be sent.
        personal: Names that will stay.
        objective: What to minimize.
        memory: For the objective, see ``Situation``.
        broadcast: For the objective, see ``Situation``.
        settings: Of the recipe.
        local: Of the task.
        generator: Draws the batches.
        dropout_seed: For dropout.
        keep_mean_gradient: Whether the report has the mean gradient of the shared names.
        hold_still: Which of the names an optimizer step must not move; None = moves all. What
            stays does so bit for bit: no decay, no momentum, and no optimizer state before the
            first step that moves it.
        watch: For the objective, called after every forward pass; see ``Situation``.

    Raises:
        FloatingPointError: The loss, or a value after the last step, is NaN or infinite.
    """
    started = time.monotonic()
    names = frozenset((*shared, *personal))
    model.set_trainable((*shared, *personal))
    # Experts of one layer may share a parameter: leaves keep them apart.
    leaves = model.leaves((*shared, *personal))
    # The plain task loss looks at no anchor; a copy of a whole model would be for nothing.
    anchor = {} if objective is causal_lm else clone(model.parameters(shared))
    optimizer = make_optimizer(leaves, settings, local)
    losses: list[float] = []
    unread: list[torch.Tensor] = []  # of a device that the host does not wait for
    waits = waiting.may_wait(model.device)
    moved: set[str] = set()
    gradient_sum = zeros_like(model.parameters(shared)) if keep_mean_gradient else {}
    num_tokens = num_examples = 0
    aux, device = settings.router_aux_coefficient, model.device
    # What is read of a whole micro-batch, such as how its routing is balanced, needs all of it.
    is_whole = aux > 0 or watch is not dict or not settings.packed or model.device.type != "cpu"
    pass_tokens = 0 if is_whole else settings.pass_tokens
    model.model.train()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            unbound_experts(model.view),
            factored_experts(model.view),
            dropout_by_row(model.model, seed=dropout_seed),
        ):
            torch.manual_seed(dropout_seed)
            for step in draw_batches(len(examples), settings, local, generator):
                batches = [[examples[index] for index in batch] for batch in step]
                step_labels = sum(example.num_labels for batch in batches for example in batch)
                allowed = names - frozenset(hold_still(batches)) if hold_still else names
                step_loss = 0.0
                on_device = torch.zeros((), dtype=torch.float64, device="cpu" if waits else device)
                for batch, share in _passes(batches, pass_tokens):
                    losses_T, router_loss = forward_losses(
                        model, batch, with_router_loss=aux > 0, packed=settings.packed
                    )
                    task_loss = losses_T.sum() / step_labels
                    if waits:
                        step_loss += task_loss.item()
                    else:
                        on_device += task_loss.detach()
                    if router_loss is not None:
                        task_loss = task_loss + aux * router_loss * share
                    loss = objective(
                        Situation(
                            task_loss=task_loss,
                            share=share,
                            shared=model.parameters(shared),
                            anchor=anchor,
                            memory=memory,
                            broadcast=broadcast,
                            watched=watch(),
                        )
                    )
                    torch.autograd.backward(loss)
                    num_tokens += sum(len(example.input_ids) for example in batch)
                    num_examples += len(batch)
                if waits:
                    _check_loss(step_loss, step=len(losses) + 1)
                if keep_mean_gradient:
                    for name, gradient in model.gradients(shared).items():
                        gradient_sum[name] += gradient
                model.hand_gradients(leaves, allowed)
                moved |= allowed
                if settings.max_grad_norm > 0:
                    torch.nn.utils.clip_grad_norm_(leaves.values(), settings.max_grad_norm)
                optimizer.step()
                # Leaves hold the model's own gradients; kept, they would be there twice.
                optimizer.zero_grad()
                model.drop_gradients()
                if waits:
                    losses.append(step_loss)
                else:
                    unread.append(on_device)
        if unread:
            losses = torch.stack(unread).tolist()
            for number, step_loss in enumerate(losses, start=1):
                _check_loss(step_loss, step=number)
        check_finite(leaves, len(losses))
    finally:
        model.drop_gradients()
        model.model.eval()
        model.set_trainable(())
        release_freed_memory()
    mean_gradient = {name: total / len(losses) for name, total in gradient_sum.items()}
    return TrainingReport(
        loss=math.fsum(losses) / len(losses),
        num_steps=len(losses),
        num_tokens=num_tokens,
        num_examples=num_examples,
        seconds=time.monotonic() - started,
        moved=frozenset(moved),
        mean_gradient=mean_gradient if keep_mean_gradient else None,
        losses=tuple(losses),
    )
