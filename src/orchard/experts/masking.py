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
from orchard.models.moe import MoELayer, MoEView


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
    experts = layer.experts

    def run(*inputs: Tensor) -> Tensor:
        # Looked up at each call: adapters give the module another class while they are active.
        output: Tensor = type(experts).forward(experts, *inputs)
        return output

    def forward(
        hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *rest: Any
    ) -> Tensor:
        x_TD, choices_TK, weights_TK = hidden_states, top_k_index, top_k_weights
        if switch.learning is None or not torch.is_grad_enabled():
            return run(x_TD, choices_TK, weights_TK, *rest)
        learning_E = switch.learning[index].to(choices_TK.device)
        if bool(learning_E.all()):
            return run(x_TD, choices_TK, weights_TK, *rest)
        # One pair of token and expert at a time, so that a family's experts need not know how to
        # skip a place; and added up by place, so that the order does not depend on the device.
        is_pair_TK = choices_TK < len(learning_E)
        learns_TK = is_pair_TK & learning_E[choices_TK.clamp(max=len(learning_E) - 1)]
        parts = []
        for learns, chosen_TK in ((True, learns_TK), (False, is_pair_TK & ~learns_TK)):
            token_P, place_P = torch.where(chosen_TK)
            if len(token_P) == 0:
                continue
            choices_P1 = choices_TK[token_P, place_P, None]
            weights_P1 = weights_TK[token_P, place_P, None]
            if learns:
                y_PD = run(x_TD[token_P], choices_P1, weights_P1, *rest)
            else:
                with torch.no_grad():
                    ones_P1 = torch.ones_like(weights_P1)
                    own_PD = run(x_TD[token_P], choices_P1, ones_P1, *rest)
                y_PD = (weights_P1 * own_PD).to(own_PD.dtype)
            parts.append((token_P, place_P, y_PD))
        if not parts:
            return run(x_TD, choices_TK, weights_TK, *rest)
        pairs_TKD = parts[0][2].new_zeros((*choices_TK.shape, x_TD.shape[-1]))
        for token_P, place_P, y_PD in parts:
            pairs_TKD = pairs_TKD.index_put((token_P, place_P), y_PD)
        return pairs_TKD.sum(dim=1)

    return forward


def _detach_listed(
    index: int, expert: int, switch: ExpertSwitch
) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if switch.learning is None or bool(switch.learning[index][expert]):
            return output
        return output.detach()

    return hook
