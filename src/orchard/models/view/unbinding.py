"""Run fused experts so that their gradients are written once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from orchard.models.kernels.wide_products import wide_products
from orchard.models.view.moe import MoEView
from orchard.models.view.storage import FusedExperts


@contextmanager
def unbound_experts(view: MoEView) -> Iterator[None]:
    """Let fused experts run by ``FusedExperts.run_routed`` while the context lasts.

    Values and gradients stay the same. A layer whose forward is already another one keeps that.
    Frozen linear layers widen their products where that is faster.
    """
    with ExitStack() as undo:
        undo.enter_context(wide_products(view.model))
        for layer in view.layers:
            if isinstance(layer.storage, FusedExperts) and "forward" not in vars(layer.experts):
                layer.experts.forward = layer.storage.run_routed
                undo.callback(delattr, layer.experts, "forward")
        yield
