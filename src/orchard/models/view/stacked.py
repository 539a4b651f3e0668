"""Experts listed under names, stacked behind the call that transformers' other families have.

Switch keeps an MLP for each expert, ``experts.expert_3.wi``, in its model as in its checkpoints. A
stacked model has one parameter of all experts of a layer, so that whatever is done with the fused
experts of other families is done with these. It is made of a checkpoint by a conversion of
transformers' own kind, and its router stays as it is: which expert a token goes to, and whether
there is room left for it (a row may send an expert no more tokens than its capacity), is for the
family's own router to say. A token without room gets nothing from the block, as in the family.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from orchard.models.view.adopting import become
from orchard.models.view.routers import read_router_output
from orchard.models.view.storage import find_projections, is_listed


class StackedExperts(nn.Module):
    """Experts without a gate, as transformers' experts interface lays them out."""

    has_gate = False
    has_bias = False
    is_transposed = False
    up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self, listed: nn.ModuleDict) -> None:
        """Stack the weights of listed experts, which may be on the ``meta`` device."""
        super().__init__()
        experts: list[Any] = list(listed.values())
        for local, attribute in _projections(listed).items():
            stack = torch.stack([getattr(expert, attribute).weight.detach() for expert in experts])
            self.register_parameter(local, nn.Parameter(stack))
        self.num_experts = len(experts)
        self.act, self.dropout = experts[0].act, experts[0].dropout

    def act_fn(self, hidden: Tensor) -> Tensor:
        """Apply what is between the projections: the activation, and in training dropout."""
        return cast(Tensor, self.dropout(self.act(hidden)))

    _apply_gate = act_fn  # by which the interface is known

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts; E stands for none."""
        y_TD = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist()) - {self.num_experts}):
            token, place = torch.where(top_k_index == expert)
            hidden = nn.functional.linear(hidden_states[token], self.up_proj[expert])
            own = nn.functional.linear(self.act_fn(hidden), self.down_proj[expert])
            weighted = own * top_k_weights[token, place, None]
            y_TD = y_TD.index_add(0, token, weighted.to(y_TD.dtype))
        return y_TD


def stacked(own: Any) -> Any:
    """Return a class of models that differs from ``own`` in how listed experts are stored."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own.__init__(self, *args, **kwargs)
        _stack(self)

    members = {
        "__module__": own.__module__,
        "__init__": __init__,
        "from_config": classmethod(_from_config),
    }
    return type(f"Stacked{own.__name__}", (own,), members)


def _from_config(
    cls: Any, /, config: Any, *, trust_remote_code: bool = False, **options: Any
) -> Any:
    assert not trust_remote_code, "the class is one of transformers"
    return cls._from_config(config, **options)


def _stack(model: nn.Module) -> None:
    """Stack every list of experts of a model, and tell transformers how checkpoints become so."""
    conversions = {}
    for path, listed in list(model.named_modules()):
        if not isinstance(listed, nn.ModuleDict) or "expert" not in type(listed).__name__.lower():
            continue
        parent, _, name = path.rpartition(".")
        block: Any = model.get_submodule(parent)
        first = next(iter(listed)).rstrip("0123456789")
        for local, attribute in _projections(listed).items():
            conversions[local] = WeightConverter(
                source_patterns=f"{name}.{first}*.{attribute}.weight",
                target_patterns=f"{name}.{local}",
                operations=[MergeModulelist(dim=0)],
            )
        setattr(block, name, StackedExperts(listed))
        become(block, forward=_route_by_mask)
        # Nothing of it is to be drawn at random, which the family would do expert by expert.
        block._is_hf_initialized = True
    if conversions:
        # By the name of the class, so that the family's own class loads as ever.
        register_checkpoint_conversion_mapping(
            type(model).__name__, list(conversions.values()), overwrite=True
        )


def _projections(listed: nn.ModuleDict) -> dict[str, str]:
    """Return what experts call their projections, by our names.

    Raises:
        ValueError: There is something else among them, or in them.
    """
    first: Any = next(iter(listed.values()))
    projections = (find_projections(first) if is_listed(listed) else None) or {}
    has_bias = any(getattr(first, own).bias is not None for own in projections.values())
    if tuple(projections) != ("up_proj", "down_proj") or has_bias:
        raise ValueError(
            "experts that are listed must be MLPs without gates and biases, and nothing beside "
            f"them, got {type(listed).__name__}; choose another checkpoint"
        )
    return projections


def _route_by_mask(self: Any, hidden_states: Tensor) -> Tensor:
    """Send each token where the router's mask says, which counts each row's tokens for itself."""
    experts, output = self.experts, self.router(hidden_states)
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    if experts.num_experts == 1:
        # Such a mask looks like choices, and the softmax of one logit is 1.
        (mask,) = (part for part in output if not part.is_floating_point())
        is_kept_T1 = mask.reshape(-1, 1).bool()
        choices_T1, weights_T1 = (~is_kept_T1).long(), is_kept_T1.to(x_TD.dtype)
    else:
        routing = read_router_output(output, num_experts=experts.num_experts, block=self)
        choices_T1, weights_T1 = routing.choices_TK, routing.weights_TK
    y_TD: Tensor = experts(x_TD, choices_T1, weights_T1)
    return y_TD.reshape(hidden_states.shape)
