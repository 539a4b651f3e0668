"""Finding a router, its rows, and what its output decided.

A router's output is read by its form: ``(logits, weights, choices)`` in any order, a one-hot
dispatch mask instead of choices (Switch Transformers), or logits alone (a plain linear layer).
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from orchard.models.view.storage import is_fused, is_listed

# What modules call K.
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "topk", "moe_topk", "top_k_experts")
# Under which names a router counts its rows where it has more than experts: those of shared experts
# (Inkling), of skipping them all (Zaya), of experts that do nothing (LongCat). They come last.
ALL_ROWS = re.compile(r"(experts|classes)$")


@dataclass(frozen=True)
class Routing:
    """The decisions of one router for T tokens, attached to the graph of the forward pass."""

    logits_TE: Tensor | None
    """Scores before softmax or sigmoid; None where the router keeps them to itself."""
    choices_TK: Tensor
    """Chosen experts; E stands for none (a token beyond an expert's capacity)."""
    weights_TK: Tensor
    """What multiplies the output of each chosen expert."""


def read_router_output(output: object, *, num_experts: int, block: nn.Module) -> Routing:
    """Read choices and weights from what a router returned.

    Args:
        output: The router's return value; leading dimensions are flattened to T.
        num_experts: E.
        block: The router's block; a router that returns logits alone leaves the choice to its
            block, whose ``top_k`` and ``norm_topk_prob`` then say how (softmax, top-k, and
            normalized or not).

    Raises:
        ValueError: The output has none of the known forms.
    """
    if isinstance(output, Tensor):
        return _choose(output.reshape(-1, num_experts), block)
    parts = [p for p in output if isinstance(p, Tensor)] if isinstance(output, tuple | list) else []
    integers = [p for p in parts if not p.is_floating_point() and p.ndim > 1]
    reals = [p for p in parts if p.is_floating_point() and p.ndim > 1]
    logits = next((p for p in reals if p.shape[-1] == num_experts), None)
    logits_TE = None if logits is None else logits.reshape(-1, num_experts)
    others = [p for p in reals if p is not logits]
    if len(integers) == 1:
        chosen = integers[0].reshape(-1, integers[0].shape[-1])
        same = [p for p in others if p.shape == integers[0].shape]
        if same:
            return Routing(logits_TE, chosen, same[0].reshape(chosen.shape))
        # Of Switch, whose mask has one dimension more before transformers 5.22.
        single = [p for p in others if p.shape[-1] == 1 and p.numel() == len(chosen)]
        if chosen.shape[-1] == num_experts and single:
            is_kept_T1 = chosen.bool().any(dim=-1, keepdim=True)
            choices_T1 = chosen.argmax(dim=-1, keepdim=True)
            weights_T1 = single[0].reshape(-1, 1)
            return Routing(
                logits_TE,
                torch.where(is_kept_T1, choices_T1, num_experts),
                torch.where(is_kept_T1, weights_T1, torch.zeros_like(weights_T1)),
            )
    shapes = [tuple(p.shape) for p in parts]
    raise ValueError(
        f"router output must hold weights and choices of one shape, got {shapes}; "
        "choose a model whose router returns them"
    )


def _choose(logits_TE: Tensor, block: nn.Module) -> Routing:
    top_k = find_top_k(block)
    is_normalized = getattr(block, "norm_topk_prob", None)
    if top_k is None or is_normalized is None:
        raise ValueError(
            f"a block whose router returns logits alone must have top_k and norm_topk_prob, "
            f"got {type(block).__name__}; choose a model whose router returns weights and choices"
        )
    probabilities_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
    weights_TK, choices_TK = probabilities_TE.topk(top_k, dim=-1)
    if is_normalized:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(logits_TE, choices_TK, weights_TK.to(logits_TE.dtype))


def find_top_k(module: nn.Module) -> int | None:
    """Return the experts per token that ``module`` states, or None."""
    for name in TOP_K_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def check_top_k(router: nn.Module, block: nn.Module, num_experts: int) -> int | None:
    """Return the experts per token that a router or its block states, or None.

    Raises:
        ValueError: There are fewer experts.
    """
    stated = [k for k in (find_top_k(router), find_top_k(block)) if k is not None]
    if not stated:
        return None
    top_k = next((k for k in stated if k), 0)
    holder = find_router_weight(router, num_experts)
    num_rows = num_experts if holder is None else len(cast(Tensor, holder.weight))
    if not 1 <= top_k <= num_rows:
        raise ValueError(
            f"num_experts_per_tok must be in 1..{num_rows}, the experts of an MoE layer, got "
            f"{top_k}; correct config.json"
        )
    return top_k


def read_router(router: nn.Module, block: nn.Module, *, num_experts: int) -> dict[str, Tensor]:
    """Return a router's tensors with one row per expert; see ``MoELayer.router_tensors``."""
    tensors = {}
    for local, (holder, name) in find_rows(router, block, num_experts=num_experts).items():
        tensor = cast(Tensor, getattr(holder, name))
        rows = tensor if local == "weight" else tensor.view(-1)
        tensors[local] = rows if len(rows) == num_experts else rows[:num_experts]
    return tensors


def find_rows(
    router: nn.Module, block: nn.Module, *, num_experts: int
) -> dict[str, tuple[nn.Module, str]]:
    """Find where a router keeps what it has one row per expert of.

    Returns:
        ``weight`` and, where there are, ``bias``, ``scale`` (what a chosen expert's weight is
        multiplied with, Gemma 4) and ``correction_bias``: the module that holds the tensor, and
        the attribute. Rows beside those of experts come after them.
    """
    holder = find_router_weight(router, num_experts)
    assert holder is not None
    found = {"weight": (holder, "weight")}
    num_rows = len(cast(Tensor, holder.weight))
    bias = getattr(holder, "bias", None)
    if isinstance(bias, Tensor) and bias.shape == (num_rows,):
        found["bias"] = (holder, "bias")
    if _num_values(router, "per_expert_scale") == num_experts:
        found["scale"] = (router, "per_expert_scale")
    # Some blocks keep the correction themselves and pass it to their router (AFMoE).
    for module in (*router.modules(), block):
        named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in named:
            is_row = tensor.shape[-1:] == (tensor.numel(),)
            is_row = is_row and tensor.numel() in (num_experts, num_rows)
            if is_row and "bias" in name and tensor is not bias:
                found["correction_bias"] = (module, name)
                return found
    return found


def find_router(siblings: dict[str, nn.Module], num_experts: int) -> nn.Module | None:
    """Return the sibling of the experts that scores them, or None.

    What is called gate or router comes first, then any module that has a weight with one row per
    expert and is not itself a block of experts.
    """
    named = [siblings[name] for name in ("gate", "router") if name in siblings]
    for child in (*named, *siblings.values()):
        is_block = any(is_fused(m) or is_listed(m) for m in child.modules())
        if not is_block and find_router_weight(child, num_experts) is not None:
            return child
    return None


def find_router_weight(router: nn.Module, num_experts: int) -> nn.Module | None:
    """Return the module in ``router`` whose weight has one row per expert, and perhaps others."""
    # Factors of adapters in it have as many rows as their rank says, which may be any number.
    named = [(name, m) for name, m in router.named_modules() if ".lora_" not in f".{name}"]
    modules: list[nn.Module] = [m for _, m in named if _is_matrix(getattr(m, "weight", None))]
    for module in modules:
        if len(cast(Tensor, module.weight)) == num_experts:
            return module
    counted = [(name, value) for _, m in named for name, value in vars(m).items()]
    more = {
        value
        for name, value in counted
        if type(value) is int and value > num_experts and ALL_ROWS.search(name)
    }
    for module in modules:
        if len(cast(Tensor, module.weight)) in more:
            return module
    return None


def find_reading_width(router: nn.Module, num_experts: int) -> int:
    """Return the width of what a router reads: that of its first layer, where it has several."""
    own = [p for name, p in router.named_parameters() if ".lora_" not in f".{name}"]
    holder = find_router_weight(router, num_experts)
    assert holder is not None
    first = next((p for p in own if p.ndim == 2), cast(Tensor, holder.weight))
    return int(first.shape[1])


def _is_matrix(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.ndim == 2


def _num_values(module: nn.Module, name: str) -> int:
    tensor = getattr(module, name, None)
    return tensor.numel() if isinstance(tensor, Tensor) else 0


def probe_top_k(router: nn.Module, block: nn.Module, num_experts: int) -> int:
    """Route one token of zeros through a copy of a router that states no number (Switch)."""
    holder = find_router_weight(router, num_experts)
    assert holder is not None
    weight, width = cast(Tensor, holder.weight), find_reading_width(router, num_experts)
    with torch.no_grad():
        output = copy.deepcopy(router).eval()(weight.new_zeros(1, 1, width))
    routing = read_router_output(output, num_experts=num_experts, block=block)
    return routing.choices_TK.shape[-1]
