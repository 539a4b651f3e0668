"""Frozen linear layers in bfloat16, on CPUs that multiply float32 faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from orchard.models.kernels.products import is_slow, multiply_back, multiply_rows


@contextmanager
def wide_products(model: nn.Module) -> Iterator[None]:
    """Let frozen linear layers widen their factors where that is faster, while the context lasts.

    What they return and their gradients are rounded once, as a product in bfloat16 is; only the
    order of the sum differs. On all other machines and dtypes nothing changes.

    Args:
        model: Its linear layers must be frozen, or become so, before they run.
    """
    with ExitStack() as undo:
        for module in model.modules():
            if not isinstance(module, nn.Linear) or "forward" in vars(module):
                continue
            is_plain = type(module).forward is nn.Linear.forward
            weight = module.weight
            if is_plain and is_slow(weight):
                module.forward = _forward(module)  # type: ignore[assignment,method-assign]
                undo.callback(delattr, module, "forward")
        yield


def _forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:
        parts = [linear.weight, *([] if linear.bias is None else [linear.bias])]
        is_trained = any(part.requires_grad for part in parts)
        if is_trained or input.dtype != linear.weight.dtype:
            return nn.Linear.forward(linear, input)
        return frozen_linear(input, linear.weight, linear.bias)

    return forward


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``functional.linear``, with a gradient of ``x`` alone, widened where faster."""
    if not is_slow(weight):
        return functional.linear(x, weight, bias)
    y: Tensor = _Wide.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = multiply_rows(x.flatten(0, -2), weight)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        dx = multiply_back(dy.flatten(0, -2), ctx.weight)
        return dx.view(*dy.shape[:-1], -1), None, None
