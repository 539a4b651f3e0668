"""Where every trainable tensor lives in a model, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from orchard.models.trainable.targets import ALL, EXPERTS, ROUTER, find_targets, is_adapter
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.routers import find_rows


@dataclass(frozen=True)
class Slot:
    """A named tensor that lives in a parameter, whole or as a slice of it.

    Attributes:
        parameter: The parameter.
        view: Returns the named part of it, sharing memory and gradient.
    """

    parameter: nn.Parameter
    view: Callable[[torch.Tensor], torch.Tensor]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return the parameter itself."""
    return parameter


def canonical(path: str) -> str:
    """Turn a parameter path of a model into a name: no ``model.`` and no adapter wrapping."""
    path = re.sub(r"\.default(\.weight)?$", "", path)
    return path.replace("base_layer.", "").removeprefix("model.")


def lora_slots(model: nn.Module, view: MoEView) -> Iterator[tuple[str, Slot]]:
    """Yield every adapter tensor with its name, in the order of the model's modules."""
    wrapped = {id(parameter) for slot in _wrapped_slots(model, view) for parameter in slot[2]}
    for path, parameter in model.named_parameters():
        if is_adapter(path) and id(parameter) not in wrapped:
            name = _name_inside_block(canonical(path), view)
            yield from _router_rows(name, parameter, view)
    for name, slot, _ in _wrapped_slots(model, view):
        yield name, slot


def _name_inside_block(name: str, view: MoEView) -> str:
    """Name adapters of listed experts and linear routers as those of fused ones are named."""
    for layer in view.layers:
        block = f"{canonical(layer.path)}."
        if name.startswith(tuple(f"{canonical(path)}." for path in layer.own_paths)):
            inside = name.removeprefix(block)
            kind, _, factor = inside.rpartition(".")
            return f"{layer.name}.{inside if kind.startswith('experts.') else f'router.{factor}'}"
    return name


def _router_rows(name: str, parameter: nn.Parameter, view: MoEView) -> Iterator[tuple[str, Slot]]:
    """Yield the factor B of a router's adapter by rows, one for each expert, all else as it is."""
    for layer in view.layers:
        if name == f"{layer.name}.router.lora_B":
            for row, expert in enumerate(layer.expert_ids):
                yield f"{layer.name}.router.{expert}.lora_B", Slot(parameter, _row(row))
            return
    yield name, Slot(parameter, whole)


def _wrapped_slots(
    model: nn.Module, view: MoEView
) -> Iterator[tuple[str, Slot, tuple[nn.Parameter, ...]]]:
    """Yield the adapters of fused experts, one expert at a time, and of routers.

    PEFT stores them for all experts at once: A is (E * R, in) with the expert slowest, B is
    (out, R * E) with the expert fastest.
    """
    layers = {canonical(layer.path): layer for layer in view.layers}
    routed = {id(p) for layer in view.layers for p in layer.storage.parameters()}
    for path, module in model.named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        lora_A, lora_B = module.lora_A["default"].weight, module.lora_B["default"].weight
        block = max(
            (prefix for prefix in layers if canonical(path).startswith(prefix)), key=len, default=""
        )
        layer = layers[block]
        if id(module.get_param()) not in routed:
            yield f"{layer.name}.router.lora_A", Slot(lora_A, whole), (lora_A,)
            for name, slot in _router_rows(f"{layer.name}.router.lora_B", lora_B, view):
                yield name, slot, (lora_B,)
            continue
        num_experts = layer.num_experts
        for index, expert in enumerate(layer.expert_ids):
            prefix = f"{layer.name}.experts.{expert}.{module.parameter_name}"
            yield f"{prefix}.lora_A", Slot(lora_A, _slice_of_A(index, num_experts)), (lora_A,)
            yield f"{prefix}.lora_B", Slot(lora_B, _slice_of_B(index, num_experts)), (lora_B,)


def full_slots(
    view: MoEView, targets: tuple[str, ...], *, adapted: tuple[str, ...]
) -> Iterator[tuple[str, Slot]]:
    """Yield what ``targets`` mean of the base itself, each with its name.

    Args:
        view: The base, before adapters are put in.
        targets: As ``LoraSettings.full``.
        adapted: Paths of modules and parameters that get adapters, which ``all`` leaves out.
    """
    paths = {id(parameter): path for path, parameter in view.model.named_parameters()}
    taken: set[int] = {
        id(parameter)
        for parameter in view.model.parameters()
        if {paths[id(parameter)], paths[id(parameter)].rpartition(".")[0]} & set(adapted)
    }
    # A skeleton has experts on meta, shapes without values, and all else elsewhere.
    is_on_meta = all(parameter.is_meta for parameter in view.model.parameters())
    if ALL in targets or EXPERTS in targets:
        for layer in view.layers:
            parameters = layer.storage.parameters()
            is_there = is_on_meta or not parameters[0].is_meta
            if is_there and not taken & {id(p) for p in parameters}:
                yield from _expert_slots(layer)
    if ALL in targets or ROUTER in targets:
        for layer in view.layers:
            if not taken & {id(parameter) for parameter in layer.router.parameters()}:
                yield from _router_slots(layer)
    if ALL in targets:
        taken |= {id(p) for layer in view.layers for p in layer.storage.parameters()}
        taken |= {id(tensor) for layer in view.layers for tensor in _rows(layer).values()}
        rest = [paths[id(p)] for p in view.model.parameters() if id(p) not in taken]
    else:
        modules, _ = find_targets(view, [t for t in targets if t not in (ROUTER, EXPERTS)])
        rest = [path for path in paths.values() if path.rpartition(".")[0] in modules]
    for path in rest:
        yield canonical(path), Slot(view.model.get_parameter(path), whole)


def _expert_slots(layer: MoELayer) -> Iterator[tuple[str, Slot]]:
    for index, expert in enumerate(layer.expert_ids):
        for local, (parameter, view) in layer.storage.slices(index).items():
            yield f"{layer.name}.experts.{expert}.{local}", Slot(parameter, view)


def _router_slots(layer: MoELayer) -> Iterator[tuple[str, Slot]]:
    tensors = _rows(layer)
    for local, kind in (
        ("weight", "router"),
        ("bias", "router_bias"),
        ("scale", "router_scale"),
    ):
        parameter = tensors.get(local)
        if isinstance(parameter, nn.Parameter):
            for row, expert in enumerate(layer.expert_ids):
                yield f"{layer.name}.{kind}.{expert}", Slot(parameter, _row(row))


def _rows(layer: MoELayer) -> dict[str, torch.Tensor]:
    """Return the tensors of a router that have a row for each expert, whole."""
    found = find_rows(layer.router, layer.block, num_experts=layer.num_experts)
    return {local: getattr(holder, name) for local, (holder, name) in found.items()}


def _row(row: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: values[row] if values.ndim == 2 else values[row : row + 1]


def _slice_of_A(expert: int, num_experts: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: weight.view(num_experts, -1, weight.shape[-1])[expert]


def _slice_of_B(expert: int, num_experts: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weight: weight.view(weight.shape[0], -1, num_experts)[:, :, expert]
