"""Cross-entropy behind a frozen output layer, with the logits of a few rows at a time.

A vocabulary of 151,936 makes the logits the largest tensors of a training step, and each row of
them serves for one number. Here a block of rows is multiplied, its losses are read, its gradient in
the hidden states is computed at once, and the block is gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from orchard.models.kernels.products import multiply_back, multiply_rows

# Of logits at a time. Smaller blocks read the output layer more often: with a vocabulary of 151,936
# this is 220 rows.
_BLOCK_BYTES = 128 << 20


def is_plain_head(head: object) -> bool:
    """Say whether an output layer is a linear layer that nobody trains or changes."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and not any(parameter.requires_grad for parameter in head.parameters())
    )


def cross_entropy(head: nn.Linear, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    """Return the cross-entropy of each token, float32, in nats: (T,).

    Args:
        head: For which ``is_plain_head`` holds; gets no gradient.
        hidden_TD: What it reads.
        targets_T: The token that each row should predict.
    """
    losses_T: Tensor = _CrossEntropy.apply(hidden_TD, head.weight, head.bias, targets_T)  # type: ignore[no-untyped-call]
    return losses_T


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor
    ) -> Tensor:
        losses_T = torch.empty(len(hidden_TD), dtype=torch.float32, device=hidden_TD.device)
        gradient_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        for rows in _blocks(len(hidden_TD), 4 * len(weight_VD)):
            logits_RV = _logits(hidden_TD[rows], weight_VD, bias_V)
            norm_R = logits_RV.logsumexp(dim=-1)
            place_R1 = targets_T[rows, None]
            losses_T[rows] = norm_R - logits_RV.gather(1, place_R1)[:, 0]
            if gradient_TD is not None:
                # In place: the logits become the loss's gradient in them.
                logits_RV.sub_(norm_R[:, None]).exp_()
                logits_RV.scatter_add_(1, place_R1, torch.full_like(norm_R, -1.0)[:, None])
                multiply_back(logits_RV, weight_VD, out_TM=gradient_TD[rows])
        ctx.save_for_backward(*(() if gradient_TD is None else (gradient_TD,)))
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale_T: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_TD,) = ctx.saved_tensors
        return (gradient_TD * scale_T[:, None]).to(gradient_TD.dtype), None, None, None


def _logits(hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return logits in float32, of their own memory."""
    logits_RV = torch.empty(len(hidden_RD), len(weight_VD), device=hidden_RD.device)
    multiply_rows(hidden_RD, weight_VD, out_TN=logits_RV)
    return logits_RV if bias_V is None else logits_RV.add_(bias_V)


def _blocks(count: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, count, step):
        yield slice(start, start + step)
