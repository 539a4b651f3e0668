"""The sum of each row's gradient, scaled down to a norm: of a whole pass at once, or row by row.

A pass over packed rows gives the gradient of each row where ``models.trainable.row_gradients`` can
tell rows apart. Else each row is read in a pass of its own, which is the reference for it: both
give the same sums within rounding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from orchard.data.encoded import IGNORED, Encoded
from orchard.evaluation.loss import forward_losses
from orchard.models.kernels.packing import why_not_packed
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.row_gradients import RowGradients, UncoveredError, why_row_by_row

log = logging.getLogger(__name__)

# Gradients of rows at a time: a row has one of all that is trained.
_MOST_BYTES = 256 << 20
# Rounding to float32 must not make a scaled gradient longer than the norm.
_BELOW = 1 - 1e-6


class Clipper:
    """Adds up clipped gradients of rows, for the names that one client trains."""

    def __init__(
        self,
        model: AdaptedModel,
        leaves: Mapping[str, nn.Parameter],
        *,
        clip: float,
        pass_tokens: int = 512,
        is_row_by_row: bool = False,
    ) -> None:
        """Look how rows can be told apart.

        Args:
            model: In training mode, with the gradients of the leaves switched on.
            leaves: Name to what the optimizer steps on.
            clip: The L2 norm, over all leaves.
            pass_tokens: On a CPU, most tokens of a pass over several rows; 0 = any number.
            is_row_by_row: Whether each row is read in a pass of its own in any case.
        """
        self._model, self._leaves, self._clip = model, leaves, clip
        self._pass_tokens = pass_tokens if model.device.type == "cpu" else 0
        self._parameters = model.whole_parameters(leaves)
        self._row_bytes = 4 * sum(parameter.numel() for parameter in self._parameters)
        self._rows = None if is_row_by_row else RowGradients(model, leaves)
        self._masks: dict[int, Tensor] = {}
        if self._rows is not None and (why := why_row_by_row(model.view)):
            self._go_row_by_row(why)
        # Of a layer's experts some may be trained; what is next to them has gradients too.
        masks = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in self._parameters}
        for part in model.parts(masks, leaves).values():
            part.fill_(1.0)
        self._masks = {key: mask for key, mask in masks.items() if not bool(mask.all())}

    @property
    def is_row_by_row(self) -> bool:
        """Whether each row is read in a pass of its own."""
        return self._rows is None

    def sum_of(self, batch: Sequence[Encoded]) -> tuple[dict[str, Tensor], float, int]:
        """Return the sum of the clipped gradients by name, the loss, summed, and its tokens."""
        whole = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in self._parameters}
        parts = dict(self._model.parts(whole, self._leaves))
        total, num_labels = 0.0, 0
        for rows in self._passes(batch):
            if self._rows is not None and (why := self._why_not_together(rows)):
                self._go_row_by_row(why)
            loss = None if self._rows is None else self._add_together(rows, whole)
            total += self._add_each(rows, parts) if loss is None else loss
            num_labels += sum(row.num_labels for row in rows)
        return parts, total, num_labels

    def _passes(self, batch: Sequence[Encoded]) -> Iterator[list[Encoded]]:
        rows: list[Encoded] = []
        most = max(1, _MOST_BYTES // max(1, self._row_bytes))
        for row in batch:
            num_tokens = sum(len(r.input_ids) for r in (*rows, row))
            is_long = 0 < self._pass_tokens < num_tokens
            if rows and (is_long or len(rows) == most):
                yield rows
                rows = []
            rows.append(row)
        if rows:
            yield rows

    def _why_not_together(self, rows: Sequence[Encoded]) -> str:
        longest = max(len(row.input_ids) for row in rows)
        return why_not_packed(self._model.model, longest=longest)

    def _go_row_by_row(self, why: str) -> None:
        self._rows = None
        log.warning("each example is read in a pass of its own, which is slower: %s", why)

    def _add_together(self, rows: Sequence[Encoded], whole: Mapping[int, Tensor]) -> float | None:
        """Add the clipped gradients of rows; None, and nothing is added, where they are mixed."""
        assert self._rows is not None
        with self._rows.watched(tuple(len(row.input_ids) for row in rows)) as watch:
            losses_T, _ = forward_losses(self._model, rows, with_router_loss=False, packed=True)
            counts = [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
            shares = torch.tensor([1 / row.num_labels for row in rows], dtype=losses_T.dtype)
            share_T = shares.repeat_interleave(torch.tensor(counts)).to(losses_T.device)
            torch.autograd.backward((losses_T * share_T).sum())
        try:
            gradients = watch.take()
        except UncoveredError:
            self._model.drop_gradients()
            self._go_row_by_row("the model uses what is trained otherwise than in linear products")
            return None
        squares = torch.zeros(len(rows), dtype=torch.float64)
        for key, gradient in gradients.items():
            if key in self._masks:
                gradient.mul_(self._masks[key])
            norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
            squares += norms.square().cpu()
        norms = squares.sqrt()
        # An example without a gradient must not be seen in the sum.
        finite = torch.nonzero(norms.isfinite())[:, 0]
        scales = (_BELOW * self._clip / norms[finite]).clamp(max=1.0).float()
        for key, gradient in gradients.items():
            own = gradient if len(finite) == len(rows) else gradient[finite.to(gradient.device)]
            total = scales.to(gradient.device) @ own.flatten(1)
            whole[key].add_(total.view_as(whole[key]))
        return float(losses_T.detach().sum())

    def _add_each(self, rows: Sequence[Encoded], sums: Mapping[str, Tensor]) -> float:
        total = 0.0
        for row in rows:
            losses_T, _ = forward_losses(self._model, [row], with_router_loss=False, packed=True)
            torch.autograd.backward(losses_T.sum() / row.num_labels)
            self._model.hand_gradients(self._leaves, self._leaves.keys())
            _add_clipped(sums, self._leaves, self._clip)
            self._model.drop_gradients()
            total += float(losses_T.detach().sum())
        for leaf in self._leaves.values():
            leaf.grad = None
        return total


def _add_clipped(
    sums: Mapping[str, Tensor], leaves: Mapping[str, nn.Parameter], clip: float
) -> None:
    gradients = {n: leaf.grad.float() for n, leaf in leaves.items() if leaf.grad is not None}
    norm = math.sqrt(math.fsum(float(g.double().square().sum()) for g in gradients.values()))
    if not math.isfinite(norm):
        return  # an example without a gradient must not be seen in the sum
    scale = min(1.0, _BELOW * clip / norm) if norm else 0.0
    for name, gradient in gradients.items():
        sums[name].add_(gradient, alpha=scale)
