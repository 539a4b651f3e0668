"""What makes a base one client's model, in the form in which rows of a batch read it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchard.experts.grafting import GraftSettings
from orchard.models.trainable.slots import canonical, full_slots
from orchard.models.trainable.targets import LoraSettings, find_targets
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.storage import FusedExperts
from orchard.personal.opening import OpenedModel
from orchard.trees import Tree

_GRAFT = ".graft."


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank change of a linear layer.

    Attributes:
        down_RI: What reads the input, float32.
        up_OR: What writes the output, scaled.
    """

    down_RI: Tensor
    up_OR: Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """One expert of a graft.

    Attributes:
        expert: Its index in the layer, of the expert that it started as.
        factors: By projection, where it is LoRA over that expert.
        dense: By projection and bias, where it is a copy of its own; empty = it is LoRA.
    """

    expert: int
    factors: Mapping[str, Factors]
    dense: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class RowGraft:
    """A client's graft in one layer.

    Attributes:
        settings: What it is made of.
        members: Its experts.
        gate: ``weight`` (D,) and perhaps ``bias`` (1,); empty where it has none.
        router: ``weight`` (G, D) and perhaps ``bias`` (G,); empty where it has one expert.
    """

    settings: GraftSettings
    members: tuple[Member, ...]
    gate: Mapping[str, Tensor]
    router: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class RowValues:
    """What makes the base one model.

    Attributes:
        linear: Path of a linear layer to its change.
        grafts: Index of a MoE layer to its graft.
        overrides: Path of a parameter to what stands in its place. Rows whose models have different
            ones cannot share a forward pass.
        body: Equal for models with the same overrides.
        opened: A whole model that is run in the base's place, with all of the above in it; None =
            the base is run.
    """

    linear: Mapping[str, Factors] = field(default_factory=dict)
    grafts: Mapping[int, RowGraft] = field(default_factory=dict)
    overrides: Mapping[str, Tensor] = field(default_factory=dict)
    body: str = ""
    opened: OpenedModel | None = None

    def num_bytes(self) -> int:
        """Return the memory of all tensors that are this model's own, overrides left out."""
        factors = [*self.linear.values()]
        loose: list[Tensor] = []
        for graft in self.grafts.values():
            loose += [*graft.gate.values(), *graft.router.values()]
            for member in graft.members:
                factors += member.factors.values()
                loose += member.dense.values()
        loose += [tensor for own in factors for tensor in (own.down_RI, own.up_OR)]
        return sum(tensor.numel() * tensor.element_size() for tensor in loose)


def read_values(
    view: MoEView,
    tree: Tree,
    *,
    lora: LoraSettings,
    graft: GraftSettings,
    graft_experts: Mapping[str, Sequence[int]],
    body: str,
) -> RowValues:
    """Turn trained tensors under their names into what rows read.

    Args:
        view: The base, on which nothing is changed.
        tree: What the model holds beyond the base, its own values over the shared ones.
        lora: What was trained, and how.
        graft: What grafts are made of.
        graft_experts: Layer name to the experts that its grafts started as.
        body: A name for the overrides that ``tree`` means, where it means some.

    Raises:
        ValueError: A name is not of this base, or has another shape.
    """
    scale = lora.alpha / lora.rank
    linear, rest = _linear(view, tree, scale=scale)
    own_graft = {name: value for name, value in rest.items() if _GRAFT in name}
    changed = {name: value for name, value in rest.items() if _GRAFT not in name}
    overrides = _overrides(view, changed, lora, scale)
    grafts = {
        index: _graft(layer, own_graft, graft, graft_experts[layer.name])
        for index, layer in enumerate(view.layers)
        if layer.name in graft_experts
    }
    return RowValues(linear, grafts, overrides, body if overrides else "")


def _linear(
    view: MoEView, tree: Tree, *, scale: float
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Split off the adapters of linear layers that see rows as they are."""
    blocks = tuple(f"{layer.path}." for layer in view.layers)
    paths = {
        canonical(path): path
        for path, module in view.model.named_modules()
        if isinstance(module, torch.nn.Linear) and not path.startswith(blocks)
    }
    found, rest = {}, dict(tree)
    for name in tree:
        base, _, factor = name.rpartition(".")
        if factor == "lora_A" and base in paths:
            down_RI = rest.pop(name).float()
            up_OR = rest.pop(f"{base}.lora_B").float() * scale
            module = view.model.get_submodule(paths[base])
            _check(name, (up_OR.shape[0], down_RI.shape[1]), module.get_parameter("weight").shape)
            found[paths[base]] = Factors(down_RI, up_OR)
    return found, rest


def _overrides(view: MoEView, tree: Tree, lora: LoraSettings, scale: float) -> dict[str, Tensor]:
    """Return parameters with adapters of routers and experts added, or as they were trained."""
    paths = {id(parameter): path for path, parameter in view.model.named_parameters()}
    changed: dict[str, Tensor] = {}

    def own(parameter: Tensor) -> Tensor:
        path = paths[id(parameter)]
        return changed.setdefault(path, parameter.detach().clone())

    left = dict(tree)
    if lora.full:
        modules, parameters = find_targets(view, lora.targets)
        for name, slot in full_slots(view, lora.full, adapted=(*modules, *parameters)):
            if name in left:
                target, value = slot.view(own(slot.parameter)), left.pop(name)
                _check(name, value.shape, target.shape)
                target.copy_(value)
    for layer in view.layers:
        if f"{layer.name}.router.lora_A" in left:
            down_RD = left.pop(f"{layer.name}.router.lora_A").float()
            names = [f"{layer.name}.router.{expert}.lora_B" for expert in layer.expert_ids]
            up_ER = torch.stack([left.pop(name).float() for name in names])
            target = own(layer.router_tensors()["weight"])
            target.add_(scale * (up_ER @ down_RD))
    pattern = re.compile(r"(.+)\.experts\.(\d+)\.(.+)\.lora_A")
    layers = {layer.name: layer for layer in view.layers}
    for name in list(left):
        if (match := pattern.fullmatch(name)) and match[1] in layers:
            _add_to_expert(layers[match[1]], int(match[2]), match[3], left, own, scale)
    if left:
        raise ValueError(
            f"{min(left)} must be a tensor of this base, got an unknown name; "
            "check that the run was made from it"
        )
    return changed


def _add_to_expert(
    layer: MoELayer, expert: int, local: str, left: dict[str, Tensor], own: object, scale: float
) -> None:
    prefix = f"{layer.name}.experts.{expert}.{local}"
    down_RI = left.pop(f"{prefix}.lora_A").float()
    up_OR = left.pop(f"{prefix}.lora_B").float()
    delta_OI = scale * (up_OR @ down_RI)
    index = layer.expert_ids.index(expert)
    storage = layer.storage
    assert callable(own)
    if isinstance(storage, FusedExperts):
        target = own(getattr(storage.module, local))[index]
        target.add_(delta_OI.t() if storage.is_transposed else delta_OI)
    else:
        target = own(layer.experts.get_submodule(f"{index}.{local}").weight)
        target.add_(delta_OI)


def _graft(
    layer: MoELayer, tree: Tree, settings: GraftSettings, experts: Sequence[int]
) -> RowGraft:
    prefix = f"{layer.name}{_GRAFT}"
    own = {name.removeprefix(prefix): t for name, t in tree.items() if name.startswith(prefix)}

    def part(start: str) -> dict[str, Tensor]:
        cut = {n.removeprefix(start): t.float() for n, t in own.items() if n.startswith(start)}
        return {name.removesuffix(".weight") or "weight": tensor for name, tensor in cut.items()}

    members = []
    scale = settings.alpha / settings.rank
    for position, expert in enumerate(experts):
        tensors = part(f"{position}." if len(experts) > 1 else "")
        is_dense = settings.kind == "dense"
        factors: dict[str, Factors] = {}
        dense: dict[str, Tensor] = {}
        for local in ("gate_proj", "up_proj", "down_proj"):
            if is_dense and local in tensors:
                dense[local] = tensors[local]
                if f"{local}.bias" in tensors:
                    dense[f"{local}_bias"] = tensors[f"{local}.bias"]
            elif f"{local}.lora_A" in tensors:
                up_OR = tensors[f"{local}.lora_B"] * scale
                factors[local] = Factors(tensors[f"{local}.lora_A"], up_OR)
        if not (factors or dense):
            raise ValueError(
                f"{prefix} must hold a graft, got no tensor of it; its file is not whole"
            )
        members.append(Member(layer.expert_ids.index(expert), factors, dense))
    gate = {name.removeprefix("gate."): t.float() for name, t in own.items() if name[:5] == "gate."}
    router = {n.removeprefix("router."): t.float() for n, t in own.items() if n[:7] == "router."}
    return RowGraft(settings, tuple(members), gate, router)


def _check(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(shape) != tuple(wanted):
        raise ValueError(
            f"{name} must change a tensor of shape {tuple(wanted)}, got one for {tuple(shape)}; "
            "check that the run was made from this base"
        )
