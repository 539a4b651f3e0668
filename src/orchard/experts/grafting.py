"""Personal experts beside the frozen ones.

A graft is a client's own expert in one MoE layer, with a small sigmoid gate on the token state:

    y(x) = F(x) + sigmoid(gate(x)) * graft(x)

A difference graft counts only as far as it has moved from the expert E that it started as,

    y(x) = F(x) + sigmoid(gate(x)) * (graft(x) - E(x))

so that it is the base at first, however far its gate is open.

A layer may have several grafts. They then are a small MoE of their own, of which all experts run:
a router of one row per graft, started at the experts' rows of the layer's router, mixes them by a
softmax, and one gate opens for the mix. It starts as open as the sum of the experts' own
exponentials says, sum_j exp(z_j) / (1 + sum_j exp(z_j)); of one expert that is the sigmoid above.

A graft starts as a pretrained expert. As LoRA it *aliases* that expert: the base weights
are never copied, a client's own tensors are the adapter, the gate and one index. Attaching uses
hooks and leaves the model's code and tensors alone; detaching gives the base back bit for bit.

Whatever a federation does to that expert, a graft starts as it was in the base: beside an expert
that is trained itself it holds the base's values, and beside a model that does not hold the expert
it holds what is read for it, one expert for each graft.

Source: FLEx (Liu et al., 2025, arXiv:2506.00965). Additive output, gate without bias started at
the router's row, and LoRA on the graft are readings of the authors' code; so is the router of
several grafts, whose common opening is ours; see the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.slots import Slot, canonical, whole
from orchard.models.trainable.targets import inject_lora, is_adapter
from orchard.models.view.moe import MoELayer

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
        mix: ``additive``, F + s * graft; ``convex``, (1 - s) * F + s * graft; or ``difference``,
            F + s * (graft - E) with E as the graft was at first.
        is_fresh: Whether a dense graft starts as no expert but with random projections, of which
            the last is zero, so that it says nothing at first.
    """

    kind: str = "lora"
    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.05
    gate: str = "router_row"
    mix: str = "additive"
    is_fresh: bool = False


@dataclass(frozen=True)
class Origin:
    """The pretrained expert that a graft starts as.

    Attributes:
        tensors: Its projections, named and oriented as ``MoELayer.expert_tensors`` does.
        row_D: Its row of the router.
        bias: Its entry of the router's bias, (); None where the router has none.
    """

    tensors: Mapping[str, Tensor]
    row_D: Tensor
    bias: Tensor | None = None


ReadOrigin: TypeAlias = Callable[[int, int], Origin]
"""From the index of a MoE layer and an expert's id to the expert in the base."""


class _Mixed(nn.Module):
    """What is mixed into a layer's output, as far as its gate opens."""

    def __init__(self, settings: GraftSettings) -> None:
        super().__init__()
        self._settings = settings
        self.openness_sum, self.openness_count = torch.zeros(()), 0
        self.scored: torch.Tensor | None = None
        self.is_real_BS: torch.Tensor | None = None

    def mix(self, x_BSD: torch.Tensor, routed_BSD: torch.Tensor) -> torch.Tensor:
        """Return the layer's output with the graft in it, in the layer's dtype."""
        openness_BS1, y_BSD = self(x_BSD)
        seen = openness_BS1.detach()
        if self.is_real_BS is not None:
            seen = seen.flatten()[self.is_real_BS.flatten()]
        self.openness_sum = self.openness_sum + seen.sum()
        self.openness_count += seen.numel()
        own_BSD: torch.Tensor = (openness_BS1 * y_BSD).to(routed_BSD.dtype)
        if self._settings.mix == "convex":
            own_BSD = own_BSD + ((1 - openness_BS1) * routed_BSD).to(routed_BSD.dtype)
            return own_BSD
        return own_BSD + routed_BSD

    def _add_gate(self, weight_D: torch.Tensor) -> None:
        self.gate = nn.ParameterDict({"weight": nn.Parameter(weight_D)})
        if self._settings.gate == "closed":
            bias = torch.full((1,), CLOSED_BIAS, device=weight_D.device)
            self.gate["bias"] = nn.Parameter(bias)

    def _gate_scores(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if self.scored is not None:
            x_BSD = self.scored.reshape(*x_BSD.shape[:-1], -1)
        # One product per token: float32 costs nothing, and a gate in bfloat16 has steps of 1/128.
        score_BS1 = functional.linear(x_BSD.float(), self.gate["weight"][None])
        if "bias" in self.gate:
            score_BS1 = score_BS1 + self.gate["bias"]
        return score_BS1


class Graft(_Mixed):
    """One personal expert and its gate."""

    def __init__(self, layer: MoELayer, origin: Origin, settings: GraftSettings) -> None:
        """Start as ``origin``.

        Args:
            layer: Where it is grafted.
            origin: The pretrained expert that it starts as.
            settings: What it is made of.
        """
        super().__init__(settings)
        self._layer = layer
        is_dense = settings.kind == "dense"
        tensors = _fresh(origin.tensors) if settings.is_fresh else origin.tensors
        self._origin = tensors
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
        weight_D = torch.zeros(layer.reads_width, device=tensors["up_proj"].device)
        if settings.gate == "router_row":
            if origin.row_D.numel() != weight_D.numel():
                raise ValueError(
                    f"strategy.graft_gate must be closed or none where the router of {layer.name} "
                    f"scores a state of its own of width {origin.row_D.numel()}, got router_row; "
                    "set it to closed"
                )
            weight_D = origin.row_D.detach().float().clone()
        if settings.gate != "none":
            self._add_gate(weight_D)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gate's opening in [0, 1], (B, S, 1), and the expert's output, (B, S, D)."""
        y_BSD = self._run(x_BSD, self._project)
        if self._settings.mix == "difference":
            y_BSD = y_BSD - self._run(x_BSD, self._project_as_begun)
        if self._settings.gate == "none":
            return torch.ones_like(y_BSD[..., :1]), y_BSD
        return torch.sigmoid(self._gate_scores(x_BSD)), y_BSD

    def _run(
        self, x_BSD: torch.Tensor, project: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        gate_BSF = project("gate_proj", x_BSD) if hasattr(self, "gate_proj") else None
        hidden_BSF = self._layer.activate(gate_BSF, project("up_proj", x_BSD))
        return self._layer.finish_expert(project("down_proj", hidden_BSF))

    def _project_as_begun(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Project as the expert did that the graft started as, by the same products."""
        module = self.get_submodule(name)
        if isinstance(module, nn.Linear):
            weight, bias = self._origin[name], self._origin.get(f"{name}_bias")
            return functional.linear(
                x.float(), weight.float(), None if bias is None else bias.float()
            ).to(x.dtype)
        base = module.get_submodule("base_layer")
        projected: torch.Tensor = base(x)
        return projected

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        module = self.get_submodule(name)
        projected: torch.Tensor
        if isinstance(module, nn.Linear):  # a dense graft computes in its own float32
            projected = functional.linear(x.float(), module.weight, module.bias).to(x.dtype)
        else:
            projected = module(x)
        return projected


class GraftMixture(_Mixed):
    """Several personal experts of one layer, their router and their gate."""

    def __init__(self, layer: MoELayer, origins: Sequence[Origin], settings: GraftSettings) -> None:
        """Start as ``origins``, mixed as the layer's router would mix them alone.

        Args:
            layer: Where they are grafted.
            origins: The pretrained experts that they start as.
            settings: What they are made of.
        """
        super().__init__(settings)
        self._grafts = [Graft(layer, own, replace(settings, gate="none")) for own in origins]
        for index, graft in enumerate(self._grafts):
            self.add_module(str(index), graft)
        rows_GD = torch.stack([own.row_D.detach().float() for own in origins])
        self.router = nn.ParameterDict({"weight": nn.Parameter(rows_GD)})
        biases = [own.bias.detach().float() for own in origins if own.bias is not None]
        if biases:
            self.router["bias"] = nn.Parameter(torch.stack(biases))
        if settings.gate == "closed":
            self._add_gate(torch.zeros(layer.reads_width, device=rows_GD.device))

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gate's opening in [0, 1], (B, S, 1), and the mixed output, (B, S, D)."""
        bias = self.router.get("bias")
        scored_BSD = x_BSD if self.scored is None else self.scored.reshape(*x_BSD.shape[:-1], -1)
        score_BSG = functional.linear(scored_BSD.float(), self.router["weight"], bias)
        weight_BSG = score_BSG.softmax(dim=-1)
        outputs = [graft(x_BSD)[1] for graft in self._grafts]
        y_BSD = torch.stack(
            [weight_BSG[..., j, None] * own_BSD for j, own_BSD in enumerate(outputs)]
        ).sum(0)
        if self._settings.gate == "none":
            return torch.ones_like(y_BSD[..., :1]), y_BSD
        if self._settings.gate == "closed":
            return torch.sigmoid(self._gate_scores(x_BSD)), y_BSD
        return torch.sigmoid(score_BSG.logsumexp(dim=-1, keepdim=True)), y_BSD


def _fresh(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the projections of an expert that was never trained, from torch's random numbers."""
    fresh = {}
    for name, tensor in like.items():
        values = torch.zeros(tensor.shape)
        if name in ("gate_proj", "up_proj"):
            values = torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5
        fresh[name] = values.to(tensor.device)
    return fresh


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
    modules: tuple[Graft | GraftMixture, ...]

    def mean_openness(self) -> tuple[float, ...]:
        """Return the mean gate of each layer over all tokens since attaching; 0 before any.

        Padding is no token.
        """
        return tuple(
            float(graft.openness_sum) / graft.openness_count if graft.openness_count else 0.0
            for graft in self.modules
        )


@contextmanager
def grafted(
    model: AdaptedModel,
    experts: Sequence[int | Sequence[int]],
    settings: GraftSettings,
    *,
    seed: int,
    read: ReadOrigin | None = None,
) -> Iterator[Grafts]:
    """Graft experts into every MoE layer while the context lasts.

    Args:
        model: The model, whole or with some experts only.
        experts: For each MoE layer in forward order, the expert that the graft starts as, or the
            experts, by their ids in the checkpoint. One alone has no router.
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
            for index, (layer, chosen) in enumerate(zip(model.view.layers, experts, strict=True)):
                own = (chosen,) if isinstance(chosen, int) else chosen
                origins = [
                    _find_origin(model, layer, expert)
                    if expert in layer.expert_ids or read is None
                    else _as_in(layer, read(index, expert))
                    for expert in own
                ]
                graft = _graft(layer, origins, settings).train(layer.block.training)
                modules.append(graft)
                for path, parameter in graft.named_parameters():
                    is_own = is_adapter(path) or path.startswith(("gate.", "router."))
                    if is_own or settings.kind == "dense":
                        slots[f"{layer.name}.graft.{canonical(path)}"] = Slot(parameter, whole)
                layer.block.add_module("graft", graft)
                undo.callback(delattr, layer.block, "graft")
                # Where experts read what the block does not, so does a graft.
                where = layer.experts if layer.is_inside else layer.block
                hook = where.register_forward_hook(partial(_add_graft, graft), with_kwargs=True)
                undo.callback(hook.remove)
                if layer.width != layer.reads_width:
                    see = layer.router.register_forward_pre_hook(
                        partial(_keep_scored, graft), with_kwargs=True
                    )
                    undo.callback(see.remove)
        undo.enter_context(_told_of_padding(model.view.model, modules))
        undo.enter_context(model.extended(slots))
        yield Grafts(tuple(slots), tuple(modules))


@contextmanager
def _told_of_padding(model: nn.Module, grafts: Sequence[_Mixed]) -> Iterator[None]:
    """Tell grafts in each forward pass of a model which tokens are real."""

    def before(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        mask_BS = kwargs.get("attention_mask")
        # While a text is generated, the mask is longer than what is fed.
        if mask_BS is not None and mask_BS.shape == kwargs["input_ids"].shape:
            tell(mask_BS.bool())

    def tell(is_real_BS: torch.Tensor | None) -> None:
        for graft in grafts:
            graft.is_real_BS = is_real_BS

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(lambda *_: tell(None)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _find_origin(model: AdaptedModel, layer: MoELayer, expert: int) -> Origin:
    """Return a held expert as it is in the base: of what is trained itself, the fresh values."""
    if expert not in layer.expert_ids:
        raise IndexError(
            f"a graft must start as an expert of {layer.name}, got {expert}; "
            f"it holds {', '.join(map(str, layer.expert_ids))}"
        )
    index = layer.expert_ids.index(expert)
    tensors = dict(layer.expert_tensors(index))
    rows = {local: rows_E[index] for local, rows_E in layer.router_tensors().items()}
    device = rows["weight"].device
    names = {f"{layer.name}.experts.{expert}.{local}": local for local in tensors}
    trained = [name for name in names if model.knows(name)]
    for name, value in model.read_fresh(trained).items():
        tensors[names[name]] = value.to(device)
    for local, kind in (("weight", "router"), ("bias", "router_bias")):
        name = f"{layer.name}.{kind}.{expert}"
        if local in rows and model.knows(name):
            rows[local] = model.read_fresh([name])[name].to(device).view_as(rows[local])
    return Origin(tensors, rows["weight"], rows.get("bias"))


def _as_in(layer: MoELayer, origin: Origin) -> Origin:
    """Return what was read for a layer in the layer's own dtypes, where its experts are."""
    held, row_D = layer.expert_tensors(0), layer.router_tensors()["weight"]
    return Origin(
        {local: tensor.to(held[local]) for local, tensor in origin.tensors.items()},
        origin.row_D.to(row_D),
        None if origin.bias is None else origin.bias.to(row_D),
    )


def _graft(
    layer: MoELayer, origins: Sequence[Origin], settings: GraftSettings
) -> Graft | GraftMixture:
    if len(origins) == 1:
        return Graft(layer, origins[0], settings)
    return GraftMixture(layer, origins, settings)


def _keep_scored(
    graft: _Mixed, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    graft.scored = args[0] if args else kwargs["hidden_states"]


def _add_graft(
    graft: _Mixed, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    x_BSD = args[0] if args else kwargs["hidden_states"]
    routed = output[0] if isinstance(output, tuple) else output
    # A block may answer with all rows in one (Llama 4).
    mixed = graft.mix(x_BSD, routed.view_as(x_BSD)).view_as(routed)
    graft.scored = None
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed
