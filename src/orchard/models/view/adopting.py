"""Experts behind a call of their own, put behind the one that transformers' other families have.

*Batched* experts (Llama 4) take all tokens times all experts, each token already multiplied with
the weight that its router gives it, zero for all but one. Their module and its block get classes of
the same names whose forward gives each expert its own tokens: parameters, their names and, up to
the order of sums, values stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn


def adopt(block: nn.Module, experts: nn.Module) -> bool:
    """Put experts behind the common call, in place, and say whether that could be done.

    Args:
        block: What routes to them.
        experts: Stacked parameters behind a call that is not known.
    """
    router = getattr(block, "router", None)
    shared = getattr(block, "shared_expert", None)
    is_batched = (
        {"gate_up_proj", "down_proj"} == {name for name, _ in experts.named_parameters()}
        and _arguments(experts) == ["hidden_states"]
        and callable(getattr(experts, "act_fn", None))
        and isinstance(router, nn.Linear)
        and isinstance(shared, nn.Module)
        and getattr(router, "top_k", None) == 1
    )
    if not is_batched:
        return False
    become(experts, forward=_run_chosen, _apply_gate=_apply_gate, is_transposed=True)
    become(block, forward=_route_inputs)
    return True


def _arguments(module: nn.Module) -> list[str]:
    code = type(module).forward.__code__
    return list(code.co_varnames[1 : code.co_argcount])


def become(module: nn.Module, **members: Callable[..., Any] | bool) -> None:
    """Give a module a class of its own, of the same name, with other members."""
    own = type(module)
    module.__class__ = type(own.__name__, (own,), {"__module__": own.__module__, **members})


def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return cast(Tensor, up * self.act_fn(gate))


def _run_chosen(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    y_TD = torch.zeros_like(hidden_states)
    for expert in sorted(set(top_k_index.flatten().tolist()) - {len(self.down_proj)}):
        token, place = torch.where(top_k_index == expert)
        hidden = self._apply_gate(hidden_states[token] @ self.gate_up_proj[expert])
        own = hidden @ self.down_proj[expert] * top_k_weights[token, place, None]
        y_TD = y_TD.index_add(0, token, own)
    return y_TD


def _route_inputs(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply each token with its weight, and give it to its expert with weight 1."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores_TE, logits_TE = self.router(x_TD)
    choices_T1 = logits_TE.argmax(dim=-1, keepdim=True)
    weights_T1 = scores_TE.gather(1, choices_T1)
    routed_TD = self.experts(x_TD * weights_T1, choices_T1, torch.ones_like(weights_T1))
    return self.shared_expert(x_TD) + routed_TD, logits_TE
