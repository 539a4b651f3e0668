"""Personal experts beside the frozen ones.

A graft is a client's own expert in one MoE layer, with a small sigmoid gate on the token state:

    y(x) = F(x) + sigmoid(gate(x)) * graft(x)

It starts as a pretrained expert of that layer. As LoRA it *aliases* that expert: the base weights
are never copied, a client's own tensors are the adapter, the gate and one index. Attaching uses
hooks and leaves the model's code and tensors alone; detaching gives the base back bit for bit.

Whatever a federation does to that expert, a graft starts as it was in the base: beside an expert
that is trained itself it holds the base's values, and beside a model that does not hold the expert
it holds what is read for it, one expert a layer.

Source: FLEx (Liu et al., 2025, arXiv:2506.00965). Additive output, gate without bias started at
the router's row, and LoRA on the graft are readings of the authors' code; see the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchard.models.adapters import AdaptedModel
from orchard.models.moe import MoELayer
from orchard.models.slots import Slot, canonical, whole
from orchard.models.targets import inject_lora, is_adapter

CLOSED_BIAS = -4.0  # sigmoid(-4) is 0.018: a graft that is all but silent, yet learns
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class GraftSettings:
    """What a graft is made of.

    Attributes:
        kind: ``lora`` over the aliased expert, or ``dense``, a trainable float32 copy.
        rank: R of the LoRA.
        alpha: The LoRA's output is scaled by alpha / rank.
        dropout: On the input of each LoRA, in [0, 1).
        gate: ``router_row`` starts the gate at the chosen expert's router row, without bias;
            ``closed`` at zero with bias -4; ``none`` has no gate, the graft always counts fully.
        mix: ``additive``, F + s * graft, or ``convex``, (1 - s) * F + s * graft.
    """

    kind: str = "lora"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    gate: str = "router_row"
    mix: str = "additive"


@dataclass(frozen=True)
class Origin:
    """The pretrained expert that a graft starts as.

    Attributes:
        tensors: Its projections, named and oriented as ``MoELayer.expert_tensors`` does.
        row_D: Its row of the router.
    """

    tensors: Mapping[str, Tensor]
    row_D: Tensor


ReadOrigin: TypeAlias = Callable[[int, int], Origin]
"""From the index of a MoE layer and an expert's id to the expert in the base."""


class Graft(nn.Module):
    """One personal expert and its gate."""

    def __init__(self, layer: MoELayer, origin: Origin, settings: GraftSettings) -> None:
        """Start as ``origin``.

        Args:
            layer: Where it is grafted.
            origin: The pretrained expert that it starts as.
            settings: What it is made of.
        """
        super().__init__()
        self._layer, self._settings = layer, settings
        is_dense = settings.kind == "dense"
        tensors = origin.tensors
        for name in _PROJECTIONS:
            if name in tensors:
                bias = tensors.get(f"{name}_bias")
                self.add_module(name, _linear(tensors[name], bias, copy=is_dense))
        if not is_dense:
            targets = [name for name in _PROJECTIONS if name in tensors]
            inject_lora(
                self,
                rank=settings.rank,
                alpha=settings.alpha,
                dropout=settings.dropout,
                modules=targets,
            )
        weight_D = torch.zeros(layer.width, device=tensors["up_proj"].device)
        if settings.gate == "router_row":
            weight_D = origin.row_D.detach().float().clone()
        if settings.gate != "none":
            self.gate = nn.ParameterDict({"weight": nn.Parameter(weight_D)})
            if settings.gate == "closed":
                bias = torch.full((1,), CLOSED_BIAS, device=weight_D.device)
                self.gate["bias"] = nn.Parameter(bias)
        self.openness_sum, self.openness_count = torch.zeros(()), 0

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gate's opening in [0, 1], (B, S, 1), and the expert's output, (B, S, D)."""
        gate_BSF = self._project("gate_proj", x_BSD) if hasattr(self, "gate_proj") else None
        hidden_BSF = self._layer.activate(gate_BSF, self._project("up_proj", x_BSD))
        y_BSD = self._layer.finish_expert(self._project("down_proj", hidden_BSF))
        if self._settings.gate == "none":
            return torch.ones_like(y_BSD[..., :1]), y_BSD
        # One product per token: float32 costs nothing, and a gate in bfloat16 has steps of 1/128.
        score_BS1 = functional.linear(x_BSD.float(), self.gate["weight"][None])
        if "bias" in self.gate:
            score_BS1 = score_BS1 + self.gate["bias"]
        return torch.sigmoid(score_BS1), y_BSD

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        module = self.get_submodule(name)
        projected: torch.Tensor
        if isinstance(module, nn.Linear):  # a dense graft computes in its own float32
            projected = functional.linear(x.float(), module.weight, module.bias).to(x.dtype)
        else:
            projected = module(x)
        return projected

    def mix(self, x_BSD: torch.Tensor, routed_BSD: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the graft in it, in the layer's dtype."""
        openness_BS1, y_BSD = self(x_BSD)
        self.openness_sum = self.openness_sum + openness_BS1.detach().sum()
        self.openness_count += openness_BS1.numel()
        own_BSD: torch.Tensor = (openness_BS1 * y_BSD).to(routed_BSD.dtype)
        if self._settings.mix == "convex":
            own_BSD = own_BSD + ((1 - openness_BS1) * routed_BSD).to(routed_BSD.dtype)
            return own_BSD
        return own_BSD + routed_BSD


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, *, copy: bool) -> nn.Linear:
    """Return a linear layer over these tensors themselves, or over float32 copies."""
    out_features, in_features = weight.shape
    module = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            own = tensor.detach().float().clone() if copy else tensor.detach()
            setattr(module, name, nn.Parameter(own, requires_grad=False))
    return module


@dataclass(frozen=True)
class Grafts:
    """The grafts of one client, attached.

    Attributes:
        names: Their trainable tensors.
        modules: One per MoE layer, in forward order.
    """

    names: tuple[str, ...]
    modules: tuple[Graft, ...]

    def mean_openness(self) -> tuple[float, ...]:
        """Return the mean gate of each layer over all tokens since attaching; 0 before any."""
        return tuple(
            float(graft.openness_sum) / graft.openness_count if graft.openness_count else 0.0
            for graft in self.modules
        )


@contextmanager
def grafted(
    model: AdaptedModel,
    experts: Sequence[int],
    settings: GraftSettings,
    *,
    seed: int,
    read: ReadOrigin | None = None,
) -> Iterator[Grafts]:
    """Graft one expert into every MoE layer while the context lasts.

    Args:
        model: The model, whole or with some experts only.
        experts: For each MoE layer in forward order, the expert that the graft starts as, by its
            id in the checkpoint.
        settings: What the grafts are made of.
        seed: Decides the values of a fresh LoRA's A; B is zero.
        read: Where experts come from that the model does not hold; None = it holds them all.

    Yields:
        The grafts, whose tensors ``model`` knows by name while the context lasts.

    Raises:
        ValueError: ``experts`` has not one expert for every MoE layer.
        IndexError: There is no such expert.
    """
    slots: dict[str, Slot] = {}
    modules = []
    with ExitStack() as undo:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for index, (layer, expert) in enumerate(zip(model.view.layers, experts, strict=True)):
                if expert in layer.expert_ids or read is None:
                    origin = _find_origin(model, layer, expert)
                else:
                    origin = _as_in(layer, read(index, expert))
                graft = Graft(layer, origin, settings).train(layer.block.training)
                modules.append(graft)
                for path, parameter in graft.named_parameters():
                    is_own = is_adapter(path) or path.startswith("gate.")
                    if is_own or settings.kind == "dense":
                        slots[f"{layer.name}.graft.{canonical(path)}"] = Slot(parameter, whole)
                layer.block.add_module("graft", graft)
                undo.callback(delattr, layer.block, "graft")
                hook = layer.block.register_forward_hook(_add_graft, with_kwargs=True)
                undo.callback(hook.remove)
        undo.enter_context(model.extended(slots))
        yield Grafts(tuple(slots), tuple(modules))


def _find_origin(model: AdaptedModel, layer: MoELayer, expert: int) -> Origin:
    """Return a held expert as it is in the base: of what is trained itself, the fresh values."""
    if expert not in layer.expert_ids:
        raise IndexError(
            f"a graft must start as an expert of {layer.name}, got {expert}; "
            f"it holds {', '.join(map(str, layer.expert_ids))}"
        )
    index = layer.expert_ids.index(expert)
    tensors = dict(layer.expert_tensors(index))
    row_D = layer.router_tensors()["weight"][index]
    names = {f"{layer.name}.experts.{expert}.{local}": local for local in tensors}
    trained = [name for name in names if model.knows(name)]
    for name, value in model.read_fresh(trained).items():
        tensors[names[name]] = value.to(row_D.device)
    row = f"{layer.name}.router.{expert}"
    if model.knows(row):
        row_D = model.read_fresh([row])[row].to(row_D.device)
    return Origin(tensors, row_D)


def _as_in(layer: MoELayer, origin: Origin) -> Origin:
    """Return what was read for a layer in the layer's own dtypes, where its experts are."""
    held, row_D = layer.expert_tensors(0), layer.router_tensors()["weight"]
    return Origin(
        {local: tensor.to(held[local]) for local, tensor in origin.tensors.items()},
        origin.row_D.to(row_D),
    )


def _add_graft(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    x_BSD = args[0] if args else kwargs["hidden_states"]
    graft = block.get_submodule("graft")
    assert isinstance(graft, Graft)
    if isinstance(output, tuple):
        return graft.mix(x_BSD, output[0]), *output[1:]
    return graft.mix(x_BSD, output)
