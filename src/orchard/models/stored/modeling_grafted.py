"""A model of a stock family with grafts: personal experts beside the routed ones, and their gates.

This file stands alone: it needs torch and transformers. ``config.grafts`` says what there is:
``mix`` (additive, convex or difference), ``gate`` (router_row, closed or none) and, for each block,
its path, the number of its grafts, their hidden width, and whether projections and mixer have
biases; and which blocks hold fewer experts than the configuration says.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen2MoeModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

MODEL_TYPE = "grafted_qwen2_moe"


class GraftedConfig(Qwen2MoeConfig):  # type: ignore[no-untyped-call]
    """The family's configuration under a name of its own, so that no stock class drops grafts."""

    model_type = MODEL_TYPE


class GraftedExpert(nn.Module):
    """One dense expert, with the activation of its block's routed experts."""

    def __init__(self, experts: nn.Module, width: int, about: dict[str, Any]) -> None:
        """Make its projections; ``experts`` stays where it is."""
        super().__init__()
        self._experts = (experts,)  # in a tuple: a child of its own block, not of this module
        bias, hidden = about["bias"], about["hidden"]
        self.has_gate = bool(getattr(experts, "has_gate", True))
        if self.has_gate:
            self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the expert on every token."""
        experts: Any = self._experts[0]
        up = self.up_proj(x)
        if self.has_gate:
            gate = self.gate_proj(x)
            if getattr(experts, "is_concatenated", True):
                joined = torch.cat((gate, up), dim=-1)
            else:
                joined = torch.stack((gate, up), dim=-1).flatten(-2)
            hidden = experts._apply_gate(joined)
        else:
            hidden = experts.act_fn(up)
        y: torch.Tensor = self.down_proj(hidden)
        return experts.post_expert_norm(y) if getattr(experts, "has_post_expert_norm", 0) else y


class Scores(nn.Module):
    """A linear layer in float32 over token states, one row for each score."""

    def __init__(self, rows: int, width: int, bias: bool) -> None:
        """Make it."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores in float32."""
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x.float(), self.weight.float(), bias)


class Graft(nn.Module):
    """The grafts of one block, mixed, behind one gate."""

    def __init__(self, experts: nn.Module, width: int, about: dict[str, Any]) -> None:
        """Make them."""
        super().__init__()
        count, self.gate, self.mix = about["count"], about["gate"], about["mix"]
        self.members = nn.ModuleList(GraftedExpert(experts, width, about) for _ in range(count))
        # What a graft of differences started as, which counts against it.
        begun = count if self.mix == "difference" else 0
        self.begun = nn.ModuleList(GraftedExpert(experts, width, about) for _ in range(begun))
        self.mixer = Scores(count, width, about["mixer_bias"]) if count > 1 else None
        has_own = self.gate == "closed" or (self.gate == "router_row" and count == 1)
        self.opening = Scores(1, width, self.gate == "closed") if has_own else None

    def forward(self, x: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        """Return the block's output with the grafts in it."""
        scores = None if self.mixer is None else self.mixer(x)
        if scores is None:
            y = self._moved(0, x)
        else:
            weights = scores.softmax(dim=-1)
            own = [weights[..., j, None] * self._moved(j, x) for j in range(len(self.members))]
            y = torch.stack(own).sum(0)
        if self.opening is not None:
            score = self.opening(x)
        elif scores is not None and self.gate != "none":
            score = scores.logsumexp(dim=-1, keepdim=True)
        else:
            score = torch.full_like(y[..., :1], torch.inf)
        opened = torch.sigmoid(score)
        mixed: torch.Tensor = (opened * y).to(routed.dtype)
        if self.mix == "convex":
            mixed = mixed + ((1 - opened) * routed).to(routed.dtype)
            return mixed
        return mixed + routed

    def _moved(self, index: int, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.members[index](x)
        return y - self.begun[index](x) if self.begun else y


def _shrink(block: Any, about: dict[str, Any]) -> None:
    """Let a block, just built, have fewer experts than the family's configuration says."""
    before, after, top_k = about["before"], about["after"], about["top_k"]
    experts, router = getattr(block, about["experts"]), getattr(block, about["router"])
    own = [block, experts, *router.modules()]
    for module in own:
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            axis = 0 if tensor.shape[0] == before else tensor.ndim - 1
            if tensor.shape[axis] != before or (module is experts and axis != 0):
                continue
            fewer = tensor.narrow(axis, 0, after).detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(fewer) if is_parameter else fewer)
        if "config" in vars(module):
            module.config = copy.copy(module.config)
        for target in (module, vars(module).get("config")):
            for name, value in list(vars(target).items()) if target is not None else []:
                if type(value) is int and name in about["top_k_names"] and value == top_k:
                    setattr(target, name, min(top_k, after))
                elif type(value) is int and name in about["count_names"] and value == before:
                    setattr(target, name, after)
        if isinstance(module, nn.Linear) and module.out_features == before:
            module.out_features = after


def _add_graft(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    x = args[0] if args else kwargs["hidden_states"]
    graft: Any = block.graft
    if isinstance(output, tuple):
        routed = output[0]
        return graft(x, routed.view_as(x)).view_as(routed), *output[1:]
    return graft(x, output)


def _add_grafts(model: nn.Module, about_all: dict[str, Any], within: str = "") -> None:
    """Let blocks of a model, just built, hold what its configuration says.

    Blocks are named as in the model for language; ``within`` is where in it ``model`` stands.
    """
    for about in about_all["held"]:
        _shrink(model.get_submodule(about["path"].removeprefix(within)), about)
    for about in about_all["blocks"]:
        block: Any = model.get_submodule(about["path"].removeprefix(within))
        experts = getattr(block, about["experts"])
        about = {**about, "mix": about_all["mix"], "gate": about_all["gate"]}
        block.add_module("graft", Graft(experts, about["width"], about))
        block.register_forward_hook(_add_graft, with_kwargs=True)


class GraftedModel(Qwen2MoeModel):  # type: ignore[no-untyped-call]
    """The family's model without its output layer, for engines that bring their own."""

    config_class = GraftedConfig
    _keep_in_fp32_modules_strict = ["graft.mixer", "graft.opening"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        """Build the family's model, then add grafts to its blocks."""
        super().__init__(config)
        _add_grafts(self, config.grafts, f"{self.base_model_prefix}.")


class GraftedForCausalLM(Qwen2MoeForCausalLM):  # type: ignore[no-untyped-call]
    """The family's model with grafts in its MoE blocks."""

    config_class = GraftedConfig
    _keep_in_fp32_modules_strict = ["graft.mixer", "graft.opening"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        """Build the family's model, then add grafts to its blocks."""
        super().__init__(config)
        _add_grafts(self, config.grafts)


def _register_conversions() -> None:
    """Let the family's checkpoints be read under the new name."""
    for old, new in (
        (Qwen2MoeForCausalLM.__name__, "GraftedForCausalLM"),
        (Qwen2MoeConfig.model_type, MODEL_TYPE),
    ):
        found: Any = get_checkpoint_conversion_mapping(old)  # type: ignore[no-untyped-call]
        if found is not None:
            register_checkpoint_conversion_mapping(new, found, overwrite=True)


_register_conversions()
