"""Train some experts of a model whose forward pass stays as it is.

Every token is routed as the router says and every expert that it chooses runs. The output of an
expert that does not learn is detached: no gradient reaches its weights, nor its input through it,
and nothing of its inner activations is kept for the backward pass. The weight that the router
gives it stays attached, so the router learns from every expert a token was routed to.

Source: HFedMoE (Fang et al., 2026, arXiv:2601.00583), Section III-D2, which masks gradients and
does not say where; detaching the output is our reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchard.experts.selection import ExpertMask
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.storage import FusedExperts


@dataclass
class ExpertSwitch:
    """Which experts learn; changed between forward passes."""

    learning: ExpertMask | None = None
    """Boolean (E,) per layer, in the order of storage; None = all learn."""


@contextmanager
def detached_experts(view: MoEView) -> Iterator[ExpertSwitch]:
    """Let only the experts of a switch learn while the context lasts.

    Values do not change, up to the order in which outputs of experts are summed. Without a
    gradient, and where all experts of a layer learn, the layer runs as it always does.

    Args:
        view: The model. Adapters on its experts are detached with them.

    Yields:
        The switch, at first with all experts learning.
    """
    switch = ExpertSwitch()
    with ExitStack() as undo:
        for index, layer in enumerate(view.layers):
            if layer.is_fused:
                # Hooks of the module run once however often its forward is called in here.
                layer.experts.forward = _forward_fused(layer, index, switch)
                undo.callback(delattr, layer.experts, "forward")
                continue
            for expert, module in enumerate(layer.experts.children()):
                handle = module.register_forward_hook(_detach_listed(index, expert, switch))
                undo.callback(handle.remove)
        yield switch


def _forward_fused(layer: MoELayer, index: int, switch: ExpertSwitch) -> Callable[..., Tensor]:
    storage = layer.storage
    assert isinstance(storage, FusedExperts)

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD, choices_TK, weights_TK = hidden_states, top_k_index, top_k_weights
        if switch.learning is None or not torch.is_grad_enabled():
            return storage.run_routed(x_TD, choices_TK, weights_TK)
        learning_E = switch.learning[index].to(choices_TK.device)
        if bool(learning_E.all()):
            return storage.run_routed(x_TD, choices_TK, weights_TK)
        num_experts = len(learning_E)
        # The last place stands for "none", which the experts skip.
        is_still_E = torch.cat((~learning_E, learning_E.new_zeros(1)))
        is_still_TK = is_still_E[choices_TK.clamp(max=num_experts)]
        y_TD = storage.run_routed(
            x_TD, choices_TK.masked_fill(is_still_TK, num_experts), weights_TK
        )
        token_P, place_P = torch.where(is_still_TK)
        if len(token_P) == 0:
            return y_TD
        with torch.no_grad():
            weights_P1 = weights_TK[token_P, place_P, None]
            own_PD = storage.run_routed(
                x_TD[token_P], choices_TK[token_P, place_P, None], torch.ones_like(weights_P1)
            )
        weighted_PD = weights_TK[token_P, place_P, None] * own_PD
        return y_TD.index_add(0, token_P, weighted_PD.to(y_TD.dtype))

    return forward


def _detach_listed(
    index: int, expert: int, switch: ExpertSwitch
) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if switch.learning is None or bool(switch.learning[index][expert]):
            return output
        return output.detach()

    return hook
