"""Which expert a client should graft: the one that alone comes closest to the whole layer.

For every MoE layer, by one forward pass of the intact model over the client's calibration tokens:

1. take what the block reads, X, and the output of its routed experts, F(X);
2. run every routed expert e alone, with the weight that the family's own router gives an expert
   when there is no other, and call that F(X; {e}); shared experts cancel in the difference;
3. add the Frobenius norm of F(X) - F(X; {e}), in float64, over the batches;
4. choose the expert with the smallest sum; of equals, the first.

That weight is 1 where a softmax over the scores is taken, of which one is left. DeepSeek-V2 and V3
multiply by ``routed_scaling_factor``, and a family that takes sigmoids and does not normalize them
has a weight for each token (``models/view/lone.py``). So both sides of the difference are on one
scale. Where the weights of the chosen add up to less than 1 (``norm_topk_prob = false``), experts
with small outputs are favored; ``fitted`` in ``graft_search`` forgives the scale of a whole set.

Nothing is cached: each batch is reduced to one number per layer and expert while it passes
through the model, so memory does not grow with the number of tokens or layers.

Source: FLEx (Liu et al., 2025, arXiv:2506.00965), after the layerwise pruning of Expert_Sparsity
(Lu et al., 2024, arXiv:2402.14800) with one expert preserved. More than one: ``graft_search``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from orchard.models.view.lone import LoneExperts, read_lone
from orchard.models.view.moe import MoELayer, MoEView

RunExpert: TypeAlias = Callable[[int, int, torch.Tensor], torch.Tensor]
"""From the index of a MoE layer, an expert and token states (T, D) to its outputs (T, D)."""
TakeBatch: TypeAlias = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes what a block reads and what its routed experts answer, both (T, D), of one batch."""


@torch.inference_mode()
def reconstruction_losses(
    view: MoEView,
    batches: Iterable[torch.Tensor],
    *,
    run_expert: RunExpert | None = None,
    output_norms: list[float] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return how far every expert alone is from its layer.

    Args:
        view: The model, without adapters in effect.
        batches: Token ids (B, S) without padding. The loss is a sum of norms per batch, so equal
            batches are needed for equal weight.
        run_expert: How one expert is run; None = as the model holds it.
        output_norms: Becomes the loss of no expert at all, one number per layer.

    Returns:
        One float64 tensor (E,) per MoE layer, in forward order.

    Raises:
        ValueError: There is no batch.
    """
    losses = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in view.layers]
    takers: list[tuple[MoELayer, TakeBatch]] = []
    for index, (layer, loss_E) in enumerate(zip(view.layers, losses, strict=True)):
        run = partial(run_expert, index) if run_expert else layer.run_expert
        lone = read_lone(layer)
        check_comparable(lone)
        takers.append((layer, partial(_add_norms, loss_E, lone, run)))
    if output_norms is not None:
        output_norms[:] = [0.0] * len(takers)
        takers = [
            (layer, partial(_add_output_norm, output_norms, index, take))
            for index, (layer, take) in enumerate(takers)
        ]
    num_batches = read_layers(view, takers, batches)
    if num_batches == 0:
        raise ValueError(
            "calibration must have at least one batch, got none; "
            "give the client training data or set strategy.calibration"
        )
    return tuple(losses)


def check_comparable(lone: LoneExperts) -> None:
    """Refuse a layer whose lone experts have weights that their own states do not tell.

    Raises:
        ValueError: The router reads another state than the experts, and weighs a lone expert by it.
    """
    if lone.layer.is_inside and lone.factor_E is None:
        raise ValueError(
            f"strategy.graft_choice must be random where experts of {lone.layer.name} read another "
            "state than their router, which weighs a lone expert by it, got reconstruction; set it "
            "to random"
        )


def read_layers(
    view: MoEView,
    takers: Iterable[tuple[MoELayer, TakeBatch]],
    batches: Iterable[torch.Tensor],
) -> int:
    """Run batches through the model, and hand each what its layer reads and answers.

    Args:
        view: The model.
        takers: Layers of it, each with what takes a batch of it.
        batches: Token ids (B, S) without padding.

    Returns:
        How many batches there were.
    """
    # What follows the last layer, such as the product with the vocabulary, is not needed.
    body = getattr(view.model, "base_model", view.model)
    num_batches = 0
    with ExitStack() as hooks:
        for layer, take in takers:
            where = layer.experts if layer.is_inside else layer.block
            handle = where.register_forward_hook(_Reader(layer, take), with_kwargs=True)
            hooks.callback(handle.remove)
        for batch_BS in batches:
            body(input_ids=batch_BS, use_cache=False)
            num_batches += 1
    return num_batches


class _Reader:
    """The hook that hands on what a block reads and what its routed experts answer."""

    def __init__(self, layer: MoELayer, take: TakeBatch) -> None:
        self._layer, self._take, self._is_inside = layer, take, False

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._is_inside:  # computing F(X) below runs the block once more
            return
        x_BSD = args[0] if args else kwargs["hidden_states"]
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        if block is self._layer.experts:
            self._take(x_TD, output.reshape(len(x_TD), -1))
            return
        self._is_inside = True
        try:
            routed_TD = self._layer.routed_output(x_TD)
        finally:
            self._is_inside = False
        self._take(x_TD, routed_TD)


def _add_norms(
    loss_E: torch.Tensor,
    lone: LoneExperts,
    run: Callable[[int, torch.Tensor], torch.Tensor],
    x_TD: torch.Tensor,
    routed_TD: torch.Tensor,
) -> None:
    """Add one batch's norms to a layer's losses."""
    whole_TD = routed_TD.double()
    weights_ET = None if lone.is_one else lone.weights(x_TD)
    for expert in range(len(loss_E)):
        alone_TD = run(expert, x_TD).double()
        if weights_ET is not None:
            alone_TD *= weights_ET[expert, :, None]
        loss_E[expert] += torch.linalg.vector_norm(whole_TD - alone_TD).cpu()


def _add_output_norm(
    norms: list[float],
    index: int,
    take: TakeBatch,
    x_TD: torch.Tensor,
    routed_TD: torch.Tensor,
) -> None:
    """Add the norm of what a layer answers to one batch, and hand the batch on."""
    norms[index] += float(torch.linalg.vector_norm(routed_TD.double()))
    take(x_TD, routed_TD)


def choose_by_reconstruction(losses: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Return the expert with the smallest loss (E,) of each layer; of equals, the first.

    Raises:
        ValueError: A loss is not finite.
    """
    for layer, loss_E in enumerate(losses):
        if not bool(torch.isfinite(loss_E).all()):
            raise ValueError(
                f"reconstruction losses must be finite, got NaN or infinity in MoE layer {layer}; "
                "check the base model and its dtype"
            )
    return tuple(int(loss_E.argmin()) for loss_E in losses)


def choose_at_random(
    view: MoEView, generator: np.random.Generator, *, num_experts: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Return random experts of each layer, in ascending order: the control for a choice."""
    if num_experts == 1:
        return tuple((int(generator.integers(layer.num_experts)),) for layer in view.layers)
    drawn = (
        generator.choice(layer.num_experts, size=num_experts, replace=False)
        for layer in view.layers
    )
    return tuple(tuple(sorted(int(expert) for expert in own)) for own in drawn)


def batch_blocks(
    blocks: Sequence[Sequence[int]], *, batch_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """Yield token blocks of one length as batches (B, S)."""
    for start in range(0, len(blocks), batch_size):
        yield torch.tensor(blocks[start : start + batch_size], device=device)
