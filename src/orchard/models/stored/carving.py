"""Shrinking the MoE layers of a model to some of their experts, before it has any weights.

A carved layer routes among the experts it holds: its router has their rows only, so the softmax is
over their logits and the top-k is among them. That is the family's own router with fewer experts,
and it is refused where fewer experts would change what the router means.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from orchard.library_errors import first_line
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.routers import ALL_ROWS, TOP_K_NAMES, find_rows
from orchard.models.view.storage import FusedExperts

# What modules and configurations call E; shared experts are not among those counted.
_COUNTS = re.compile(r"^(n|num)_((local|routed|total)_)?experts$|^experts_per_group$")
_GROUPS = re.compile(r"^(n|num)_(expert_)?groups?$")


def check_kept(view: MoEView, kept: Sequence[Sequence[int]]) -> None:
    """Check that ``kept`` names experts of every layer.

    Raises:
        ValueError: The number of layers is another, or a layer's experts are none, repeated, out
            of order or unknown.
    """
    if len(kept) != len(view.layers):
        raise ValueError(
            f"kept must have one entry for each of the {len(view.layers)} MoE layers, "
            f"got {len(kept)}; give the experts of every layer"
        )
    for layer, experts in zip(view.layers, kept, strict=True):
        ids = list(experts)
        is_known = all(0 <= expert < layer.num_experts for expert in ids)
        if not ids or not is_known or ids != sorted(set(ids)):
            raise ValueError(
                f"kept experts of {layer.name} must be one or more distinct numbers in "
                f"0..{layer.num_experts - 1}, ascending, got {ids}; correct the list"
            )


def check_carvable(view: MoEView, kept: Sequence[Sequence[int]]) -> None:
    """Check that routers mean the same with the kept experts alone; changes ``view``'s model.

    Args:
        view: A model on the ``meta`` device, of no further use afterwards.
        kept: Checked experts of every layer.

    Raises:
        ValueError: A router chooses among groups of experts, holds something per expert whose
            meaning is unknown, or cannot choose among so few.
    """
    view.model.eval()
    for layer, experts in zip(view.layers, kept, strict=True):
        if len(experts) == layer.num_experts:
            continue
        _check_router(layer)
        carved = carve_layer(layer, experts)
        _resize_experts(carved, len(experts))
        _check_choice(replace(carved, storage=FusedExperts(layer.experts)))


def carve_layer(layer: MoELayer, experts: Sequence[int]) -> MoELayer:
    """Shrink a layer's router, and every count of experts, to the kept ones.

    The experts' parameters are left as they are. Rows lose their values: the model is on ``meta``.

    Args:
        layer: A whole layer.
        experts: Which to keep, ascending.

    Returns:
        The layer with its new ``top_k`` and ``expert_ids``.
    """
    num_experts, num_kept, num_rows = layer.num_experts, len(experts), layer.num_rows
    if num_kept == num_experts:
        return layer
    rows = find_rows(layer.router, layer.block, num_experts=num_experts)
    for local, (holder, name) in rows.items():
        tensor = cast(Tensor, getattr(holder, name))
        kept = with_other_rows(experts, tensor, local, num_experts)
        _replace(holder, name, select_rows(tensor, local, kept))
        if isinstance(holder, nn.Linear):
            holder.out_features = len(kept)
    top_k = min(layer.top_k, num_kept)
    for module in {layer.block, layer.experts, *layer.router.modules()}:
        config = vars(module).get("config")
        if config is not None:
            # All layers share it, and each has a number of experts of its own.
            module.config = copy.copy(config)
        for target in (module, vars(module).get("config")):
            recount(target, num_experts, num_kept, layer.top_k)
    if num_rows > num_experts:
        for module in layer.router.modules():
            _recount_rows(module, num_rows, num_kept + num_rows - num_experts)
    return replace(layer, top_k=top_k, expert_ids=tuple(experts))


def with_other_rows(
    experts: Sequence[int], tensor: Tensor, local: str, num_experts: int
) -> list[int]:
    """Return the rows of kept experts and those that are no expert's.

    Args:
        experts: The kept ones.
        tensor: A whole tensor of a router, as ``find_rows`` names it.
        local: Its name there.
        num_experts: E before carving.
    """
    size = tensor.shape[0 if local == "weight" else tensor.ndim - 1]
    return [*experts, *range(num_experts, size)]


def select_rows(tensor: Tensor, local: str, experts: Sequence[int]) -> Tensor:
    """Return a copy of the experts' rows of a router's tensor, as ``find_rows`` names it."""
    index = torch.tensor(experts, device=tensor.device)
    return tensor.index_select(0 if local == "weight" else tensor.ndim - 1, index)


def _check_router(layer: MoELayer) -> None:
    for module in (layer.block, *layer.router.modules()):
        for name, value in vars(module).items():
            if _GROUPS.match(name) and isinstance(value, int) and value > 1:
                raise _uncarvable(layer, f"{name} {value}: it chooses among groups of experts")
    num_experts = layer.num_experts
    rows = find_rows(layer.router, layer.block, num_experts=num_experts)
    known = {id(getattr(holder, name)) for holder, name in rows.values()}
    named = [*layer.router.named_parameters(), *layer.router.named_buffers()]
    named += [*layer.block.named_parameters(recurse=False)]
    named += [*layer.block.named_buffers(recurse=False)]
    for name, tensor in named:
        if id(tensor) in known:
            continue
        if num_experts in tensor.shape or not tensor.is_floating_point():
            raise _uncarvable(layer, f"{name} of shape {tuple(tensor.shape)} beside its rows")


def _check_choice(layer: MoELayer) -> None:
    """Let the carved block route one token on ``meta``, where shapes are all there is."""
    weight = layer.router_tensors()["weight"]
    x_TD = torch.empty(1, layer.reads_width, dtype=weight.dtype, device="meta")
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values())[1])
        raise _RoutedError

    handle = layer.experts.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        if layer.is_whole_layer:
            seen.append(layer.route(x_TD)[0])
        else:
            layer.block(x_TD.unsqueeze(0))
    except _RoutedError:
        pass
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = first_line(error)
        raise _uncarvable(
            layer, f"{layer.num_experts} experts to choose from ({reason})"
        ) from error
    finally:
        handle.remove()
    (choices_TK,) = seen
    if choices_TK.shape[-1] != layer.top_k:
        raise _uncarvable(
            layer, f"{choices_TK.shape[-1]} choices among {layer.num_experts} kept experts"
        )


class _RoutedError(Exception):
    """The block has chosen; there is no need to run experts."""


def _resize_experts(layer: MoELayer, num_experts: int) -> None:
    for name, tensor in list(layer.experts.named_parameters(recurse=False)):
        _replace(layer.experts, name, tensor.new_empty((num_experts, *tensor.shape[1:])))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, name, tensor)


def recount(target: Any, num_experts: int, num_kept: int, top_k: int) -> None:
    """Change every count of experts, and every K above it, that a module or configuration has."""
    for name, value in list(vars(target).items()) if target is not None else []:
        if type(value) is not int:
            continue
        if name in TOP_K_NAMES and value == top_k:
            setattr(target, name, min(top_k, num_kept))
        elif _COUNTS.match(name) and value == num_experts:
            setattr(target, name, num_kept)


def count_names(block: nn.Module) -> list[str]:
    """Return the names under which a block, and the configuration in it, count experts."""
    modules = list(block.modules())
    configs = [vars(m)["config"] for m in modules if vars(m).get("config") is not None]
    found = {name for own in (*modules, *configs) for name in vars(own) if _COUNTS.match(name)}
    return sorted(found)


def _recount_rows(module: nn.Module, num_rows: int, num_kept: int) -> None:
    for name, value in list(vars(module).items()):
        if type(value) is int and value == num_rows and ALL_ROWS.search(name):
            setattr(module, name, num_kept)


def _uncarvable(layer: MoELayer, got: str) -> ValueError:
    return ValueError(
        f"router of {layer.name} must choose among any of its experts alone, got {got}; "
        "keep all experts of this layer, or choose another checkpoint"
    )
