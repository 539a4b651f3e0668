"""One view of every Mixture-of-Experts model: an expert is a name.

The view turns whatever storage a model uses into names such as ``layers.3.experts.17.down_proj``
or ``layers.3.router.17``, and back. MoE layers are found by their interface (see ``detection``), so
that a family nobody listed works as long as it is built like the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from orchard.models.view.held import HeldExperts
from orchard.models.view.routers import (
    Routing,
    find_reading_width,
    find_router_weight,
    find_rows,
    read_router,
    read_router_output,
)
from orchard.models.view.storage import ExpertStorage, FusedExperts
from orchard.trees import SlicedTensor


@dataclass(frozen=True, eq=False)
class MoELayer:
    """One MoE block: its router, its routed experts, its shared experts."""

    name: str
    """Unique and the same for every wrapper of the model: ``layers.3``, ``decoder.layers.3``."""
    path: str
    """The block's path in ``model.named_modules()``: ``model.layers.3.mlp``."""
    block: nn.Module
    """The module whose forward routes tokens to experts."""
    router: nn.Module
    """The layer that scores experts."""
    experts: nn.Module
    """The module that holds the routed experts."""
    shared_experts: tuple[nn.Module, ...]
    """Experts inside the block that every token uses; often empty."""
    top_k: int
    """K, experts per token."""
    storage: ExpertStorage
    """How ``experts`` stores its tensors."""
    expert_ids: tuple[int, ...]
    """What the checkpoint calls the experts held here, in the order of storage: ``range(E)``,
    unless the layer was loaded with some of them (see ``submodel``). Names carry these ids;
    choices, and everything that takes an index, count in the order of storage."""

    @property
    def num_experts(self) -> int:
        """E, routed experts that the block holds."""
        return self.storage.num_experts

    @property
    def width(self) -> int:
        """D, what an expert reads and writes (a latent width where the block projects first)."""
        return self.storage.width

    @property
    def num_rows(self) -> int:
        """Rows of the router: E, and those of shared experts or of none."""
        holder = find_router_weight(self.router, self.num_experts)
        assert holder is not None
        return len(cast(Tensor, holder.weight))

    @property
    def reads_width(self) -> int:
        """The width of what the router reads."""
        return find_reading_width(self.router, self.num_experts)

    @property
    def is_whole_layer(self) -> bool:
        """Whether the block is a decoder layer, with attention in it (Gemma 4)."""
        children = self.block.children()
        return any("attention" in type(child).__name__.lower() for child in children)

    @property
    def is_inside(self) -> bool:
        """Whether experts read something else than the block does: a narrower state, or a part."""
        return self.is_whole_layer or self.width != self.reads_width

    @property
    def own_paths(self) -> tuple[str, ...]:
        """The paths of what belongs to the MoE: the block, or of a whole layer router and experts.

        Shared experts are among them.
        """
        if not self.is_whole_layer:
            return (self.path,)
        own = (self.router, self.experts, *self.shared_experts)
        named = self.block.named_children()
        return tuple(f"{self.path}.{name}" for name, child in named if child in own)

    @property
    def expert_width(self) -> int:
        """F, the hidden width of one routed expert."""
        return self.storage.expert_width

    @property
    def is_fused(self) -> bool:
        """Whether all experts share their parameters, as slices."""
        return isinstance(self.storage, FusedExperts)

    def expert_tensors(self, expert: int) -> dict[str, Tensor]:
        """Return one expert's projections, in ``nn.Linear`` orientation.

        The tensors alias the model: gradients flow through them, and writing to them (under
        ``torch.no_grad()``) changes the model. They may be strided.

        Args:
            expert: Index in 0..E-1.

        Returns:
            ``gate_proj`` (F, D), ``up_proj`` (F, D), ``down_proj`` (D, F), and ``gate_proj_bias``
            (F,) and so on where there are biases; no ``gate_proj`` in an ungated expert.

        Raises:
            IndexError: ``expert`` is out of range.
        """
        self._check_expert(expert)
        return self.storage.tensors(expert)

    def router_tensors(self) -> dict[str, Tensor]:
        """Return the router's tensors with one row per expert, aliasing the model.

        Returns:
            ``weight`` (E, D) and, where there are, ``bias`` (E,), which is added to the logits,
            ``scale`` (E,), which multiplies the weights of chosen experts (Gemma 4), and
            ``correction_bias`` (E,), which only steers the choice (DeepSeek-V3).
        """
        return read_router(self.router, self.block, num_experts=self.num_experts)

    def activate(self, gate_TF: Tensor | None, up_TF: Tensor) -> Tensor:
        """Apply the family's own nonlinearity between the projections.

        Args:
            gate_TF: Output of the gate projection, with bias; None for an ungated expert.
            up_TF: Output of the up projection, with bias.

        Returns:
            What the down projection reads, (T, F).
        """
        return self.storage.activate(gate_TF, up_TF)

    def finish_expert(self, y_TD: Tensor) -> Tensor:
        """Apply what follows an expert's down projection: in most families nothing.

        Args:
            y_TD: Output of the down projection, with bias, (T, D).
        """
        return self.storage.finish(y_TD)

    def run_expert(self, expert: int, x_TD: Tensor) -> Tensor:
        """Run one routed expert on every token, with weight 1.

        Args:
            expert: Index in 0..E-1.
            x_TD: What the experts read, (T, D).

        Returns:
            (T, D), differentiable in ``x_TD`` and in the expert's parameters. Adapters that
            wrap a fused experts module are not part of it.

        Raises:
            IndexError: ``expert`` is out of range.
        """
        self._check_expert(expert)
        return self.storage.run(expert, x_TD)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts that the block chooses for each token, and their weights.

        Args:
            x_TD: What the block reads, as one sequence (T, D); a capacity counts its tokens.

        Returns:
            Choices (T, K), with E for none, and weights (T, K).
        """
        if self.is_fused and not self.is_whole_layer:
            choices_TK, weights_TK, _ = self._run_block(x_TD)
            return choices_TK, weights_TK
        routing = self._route_listed(x_TD)
        return routing.choices_TK, routing.weights_TK

    def score(self, x: Tensor) -> Tensor | None:
        """Return the logits of a router that keeps them to itself (Switch, before 5.22), (T, E).

        Args:
            x: What the router read; the last dimension is the width.

        Returns:
            None where more scores than one linear layer in it.
        """
        holder = find_router_weight(self.router, self.num_experts)
        own = len(list(self.router.parameters()))
        if holder is None or holder is self.router or len(list(holder.parameters())) < own:
            return None
        weight = cast(Tensor, holder.weight)
        logits_TE: Tensor = holder(x.reshape(-1, x.shape[-1]).to(weight.dtype))
        return logits_TE

    def routed_output(self, x_TD: Tensor) -> Tensor:
        """Return the weighted sum of the chosen routed experts, without shared experts.

        Args:
            x_TD: What the block reads, as one sequence (T, D); a capacity counts its tokens. Of a
                whole layer, what both router and experts are to read.

        Returns:
            (T, D), differentiable in ``x_TD``.
        """
        if self.is_fused and not self.is_whole_layer:
            return self._run_block(x_TD)[2]
        routing = self._route_listed(x_TD)
        y_TD = torch.zeros_like(x_TD)
        for expert in sorted(set(routing.choices_TK.flatten().tolist()) - {self.num_experts}):
            token, position = torch.where(routing.choices_TK == expert)
            weighted = (
                self.run_expert(expert, x_TD[token]) * routing.weights_TK[token, position, None]
            )
            y_TD = y_TD.index_add(0, token, weighted.to(y_TD.dtype))
        return y_TD

    def _run_block(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the block of fused experts and return choices, weights and the experts' output."""
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def see(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            _, choices_TK, weights_TK = (*args, *kwargs.values())[:3]
            seen.append((choices_TK, weights_TK, output))

        handle = self.experts.register_forward_hook(see, with_kwargs=True)
        try:
            # A copy: a block may add its jitter to what it reads in place.
            self.block(x_TD.unsqueeze(0).clone())
        finally:
            handle.remove()
        ((choices_TK, weights_TK, y_TD),) = seen
        return choices_TK, weights_TK, y_TD.reshape(x_TD.shape[0], -1)

    def _route_listed(self, x_TD: Tensor) -> Routing:
        output = self.router(x_TD.unsqueeze(0))
        return read_router_output(output, num_experts=self.num_experts, block=self.block)

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise IndexError(
                f"expert must be in 0..{self.num_experts - 1}, got {expert}; "
                f"{self.name} has {self.num_experts} routed experts"
            )


def check_beside(layers: Iterable[MoELayer], *, doing: str) -> None:
    """Refuse grafts that stand among the experts and not beside their block.

    Args:
        layers: Those with grafts.
        doing: What cannot be done.

    Raises:
        ValueError: There is one.
    """
    for layer in layers:
        if layer.is_inside:
            raise ValueError(
                f"grafts must stand beside their block to be {doing}, got {layer.name}, whose "
                "experts read another state than the block; ask the model with orchard generate"
            )


class MoEView:
    """Every expert and router row of a model, by name; see ``view_moe``."""

    def __init__(self, model: nn.Module, layers: tuple[MoELayer, ...]) -> None:
        """Name the tensors of ``layers``.

        Args:
            model: The model, which the view never changes except through ``write``.
            layers: Its MoE layers, in forward order.
        """
        self.model = model
        self.layers = layers
        self._index: dict[str, tuple[MoELayer, str, int]] = {}
        for layer in layers:
            local_names = tuple(layer.expert_tensors(0))
            for index, expert in enumerate(layer.expert_ids):
                for local in local_names:
                    name = f"{layer.name}.experts.{expert}.{local}"
                    self._index[name] = (layer, f"experts.{local}", index)
            for local in layer.router_tensors():
                kind = "router" if local == "weight" else f"router_{local}"
                for index, expert in enumerate(layer.expert_ids):
                    self._index[f"{layer.name}.{kind}.{expert}"] = (layer, local, index)

    def names(self) -> tuple[str, ...]:
        """Return the name of every expert tensor and every router row, layer by layer.

        ``layers.3.experts.17.down_proj``, ``layers.3.router.17`` (a row of the weight, (D,)),
        ``layers.3.router_bias.17``, ``layers.3.router_scale.17`` and
        ``layers.3.router_correction_bias.17`` ((1,)). The number of
        an expert is its id in the checkpoint, ``MoELayer.expert_ids``.
        """
        return tuple(self._index)

    def read(self, name: str) -> Tensor:
        """Return the tensor with this name: a detached view of the model's memory.

        Raises:
            KeyError: No tensor has this name.
        """
        if name not in self._index:
            raise KeyError(
                f"name must be an expert tensor or router row, got {name!r}; "
                f"this model's names start at {next(iter(self._index))!r}"
            )
        layer, kind, index = self._index[name]
        if kind.startswith("experts."):
            return layer.expert_tensors(index)[kind.removeprefix("experts.")].detach()
        rows = layer.router_tensors()[kind].detach()
        return rows[index] if rows.ndim == 2 else rows[index : index + 1]

    def write(self, name: str, tensor: Tensor) -> None:
        """Copy ``tensor`` into the model, in place; the source may be on another device.

        Raises:
            KeyError: No tensor has this name.
            ValueError: Shape or dtype is not that of the model's tensor.
        """
        target = self.read(name)
        if tensor.shape != target.shape or tensor.dtype != target.dtype:
            raise ValueError(
                f"{name} must be {target.dtype} of shape {tuple(target.shape)}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}; convert it before writing"
            )
        with torch.no_grad():
            target.copy_(tensor)

    def state(self) -> dict[str, Tensor | SlicedTensor]:
        """Return all parameters and buffers by name; what is held elsewhere as what reads it."""
        held = {
            id(layer.experts._parameters[name]): sliced
            for layer in self.layers
            if isinstance(layer.storage, HeldExperts)
            for name, sliced in layer.storage.held.items()
        }
        return {
            **{name: held.get(id(p), p) for name, p in self.model.named_parameters()},
            **dict(self.model.named_buffers()),
        }

    def routed_parameters(self) -> frozenset[str]:
        """Return the names, as in ``model.named_parameters()``, that hold routed experts.

        A fused parameter holds a tensor of all experts of its layer. Adapters are not included.
        """
        return self._names_of([p for layer in self.layers for p in layer.storage.parameters()])

    def router_parameters(self) -> frozenset[str]:
        """Return the names, as in ``model.named_parameters()``, of all parameters in routers."""
        return self._names_of([p for layer in self.layers for p in layer.router.parameters()])

    def scoring_parameters(self) -> frozenset[str]:
        """Return the names of the parameters in routers that have a row for each expert."""
        rows = [
            getattr(holder, name)
            for layer in self.layers
            for holder, name in find_rows(
                layer.router, layer.block, num_experts=layer.num_experts
            ).values()
        ]
        return self._names_of([tensor for tensor in rows if isinstance(tensor, nn.Parameter)])

    def _names_of(self, parameters: list[nn.Parameter]) -> frozenset[str]:
        ids = {id(parameter) for parameter in parameters}
        return frozenset(name for name, p in self.model.named_parameters() if id(p) in ids)
