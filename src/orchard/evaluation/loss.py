"""Cross-entropy of responses, for training and for measuring alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from orchard.data.encoded import IGNORED, Encoded, IntArray, collate, collate_pairs
from orchard.models.kernels.heads import cross_entropy, is_plain_head
from orchard.models.kernels.packing import can_pack, pack, packed_attention
from orchard.models.kernels.pairs import is_pair, start_id
from orchard.models.trainable.adapters import AdaptedModel


def forward_losses(
    model: AdaptedModel,
    batch: Sequence[Encoded],
    *,
    with_router_loss: bool = False,
    packed: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a batch and return what its responses cost.

    Args:
        model: The model, in training or evaluation mode.
        batch: Encoded examples.
        with_router_loss: Whether to return the model's own load-balancing loss too.
        packed: Whether to put rows behind each other where the model can be run so; else they are
            padded on the right.

    Returns:
        The cross-entropy of every response token, flat, float32, in nats; and the load-balancing
        loss, scalar, or None where it was not asked for.

    Raises:
        ValueError: The model has no load-balancing loss.
    """
    options = {"output_router_logits": True} if with_router_loss else {}
    longest = max(len(example.input_ids) for example in batch)
    with ExitStack() as undo:
        if packed and can_pack(model.model, longest=longest):
            rows = pack([example.input_ids for example in batch], model.device)
            arguments = rows.arguments()
            # What follows the last token of a row is not its own.
            labels = [[*example.labels[1:], IGNORED] for example in batch]
            targets_BS = np.array([[t for row in labels for t in row]], dtype=np.int64)
            undo.enter_context(packed_attention(model.model))
        else:
            arrays, targets_BS = _padded(model, batch)
            arguments = {k: torch.from_numpy(array).to(model.device) for k, array in arrays.items()}
        # Told on the host: a device would have to be waited for to say how many there are.
        is_response_BS = targets_BS != IGNORED
        row_T, column_T = np.nonzero(is_response_BS)
        places = torch.from_numpy(row_T * targets_BS.shape[1] + column_T)
        places_T = places.to(model.device)
        read = undo.enter_context(_read_only_at(model, places_T, targets_BS.shape))
        outputs = model.model(**arguments, use_cache=False, **options)
    router_loss = getattr(outputs, "aux_loss", None) if with_router_loss else None
    if with_router_loss and not isinstance(router_loss, torch.Tensor):
        raise ValueError(
            f"client.router_aux_coefficient must be 0 for {type(model.model).__name__}, which has "
            "no load-balancing loss; set it to 0"
        )
    targets_T = torch.from_numpy(targets_BS[is_response_BS]).to(model.device)
    network: Any = model.model
    if read:
        return cross_entropy(network.get_output_embeddings(), read[0], targets_T), router_loss
    logits: torch.Tensor = outputs.logits
    # A head that is no module of its own has made the logits of all places.
    logits_TV = logits if logits.ndim == 2 else logits.flatten(0, 1)[places_T]
    losses_T = functional.cross_entropy(logits_TV.float(), targets_T, reduction="none")
    return losses_T, router_loss


def _padded(model: AdaptedModel, batch: Sequence[Encoded]) -> tuple[dict[str, IntArray], IntArray]:
    """Return what a model reads of a batch, and what it is to say at each place."""
    pad_id = model.tokenizer.pad_token_id
    if is_pair(model.model):
        arrays = collate_pairs(batch, pad_id=pad_id, start_id=start_id(model.model))
        return arrays, arrays.pop("labels")
    arrays = collate(batch, pad_id=pad_id)
    following = np.roll(arrays.pop("labels"), -1, axis=1)
    following[:, -1] = IGNORED
    return arrays, following


@contextmanager
def _read_only_at(
    model: AdaptedModel, places_T: torch.Tensor, shape: tuple[int, ...]
) -> Iterator[list[torch.Tensor]]:
    """Let the model's head see those places alone; vocabularies are large and prompts long.

    Args:
        model: The model, whose forward pass returns logits (T, V) inside.
        places_T: Which places to keep, counted over all rows of S.
        shape: (B, S).

    Yields:
        What the head would have read of those places, (T, D), where its losses can be computed in
        blocks; the model's own logits then are of one place. Else empty.
    """
    network: Any = model.model
    found = network.get_output_embeddings()
    can_defer = model.ends_with_head and is_plain_head(found)
    deferred: list[torch.Tensor] = []

    def select(head: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        (hidden_BSD, *_) = args
        if hidden_BSD.shape[:2] != shape:
            return None
        hidden_TD = hidden_BSD.flatten(0, 1)[places_T]
        if not can_defer:
            return hidden_TD
        deferred.append(hidden_TD)
        return hidden_TD[:1].detach()

    handle = found.register_forward_pre_hook(select) if isinstance(found, nn.Module) else None
    try:
        yield deferred
    finally:
        if handle is not None:
            handle.remove()


@torch.inference_mode()
def mean_loss(
    model: AdaptedModel,
    examples: Sequence[Encoded],
    *,
    batch_size: int,
    of_each: list[tuple[float, int]] | None = None,
) -> float:
    """Return the mean cross-entropy per response token over all examples, in nats.

    Args:
        model: The model, as it stands.
        examples: Encoded examples.
        batch_size: Examples at a time.
        of_each: Gets for each example, in their order, the sum over its tokens and their number.
    """
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    sums, num_tokens = [], 0
    found: dict[int, tuple[float, int]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        losses_T, _ = forward_losses(model, [examples[index] for index in batch])
        sums.append(float(losses_T.double().sum()))
        num_tokens += losses_T.numel()
        # What stands first is predicted by nothing before it.
        counts = [sum(label != IGNORED for label in examples[i].labels[1:]) for i in batch]
        for index, own_T in zip(batch, torch.split(losses_T.double(), counts), strict=True):
            found[index] = (float(own_T.sum()), own_T.numel())
    if of_each is not None:
        of_each += [found[index] for index in range(len(examples))]
    return math.fsum(sums) / num_tokens
