"""Rows of one batch, each with its own adapters and grafts.

The base's part of every layer runs once for all rows. What differs between models is small, and
runs for all of them at once: rows are cut into groups of one model and about equal size, and each
low-rank factor is one product over all groups. So eight models cost about what one costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from orchard.models.view.moe import MoELayer, MoEView, check_beside
from orchard.serving.held import experts_of
from orchard.serving.values import Factors, Member, RowGraft, RowValues

_STACKED_BYTES = 8 * 2**20
"""At most so many bytes of a layer's experts are copied to run as one product."""


@dataclass(frozen=True, eq=False)
class _Groups:
    """Rows in groups of one size.

    Attributes:
        index_GC: The rows of each group; what fills a short one up is its first row again.
        place_P: Where real rows stand in the flattened index.
        row_P: Which rows they are.
    """

    index_GC: Tensor
    place_P: Tensor
    row_P: Tensor

    def gather(self, x_BSD: Tensor) -> Tensor:
        """Return the rows of each group, (G, C * S, D), whatever axes S stands for."""
        rows = x_BSD[self.index_GC.flatten()]
        return rows.reshape(len(self.index_GC), -1, x_BSD.shape[-1])

    def add(self, target_BSD: Tensor, y_GTD: Tensor) -> Tensor:
        """Add what groups computed to their rows, in float32, and return it in the old dtype."""
        own_PSD = y_GTD.reshape(-1, *target_BSD.shape[1:])[self.place_P]
        whole = target_BSD.float().index_add(0, self.row_P, own_PSD.float())
        return whole.to(target_BSD.dtype)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Low-rank factors of all groups: (G, I, R) and (G, R, O)."""

    down_GIR: Tensor
    up_GRO: Tensor

    def run(self, x_GTI: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x_GTI.float(), self.down_GIR), self.up_GRO)


@dataclass(frozen=True, eq=False)
class _Gates:
    """How much each group's expert counts, of all groups at once.

    Attributes:
        weight_GD: Of the gates; zeros where a graft has none.
        bias_G: Infinite where a graft is always open.
        routers: (G, K, D) and (G, K) where a graft has several experts. One that has fewer than K
            has a bias of minus infinity at what it lacks.
        place_G: Which expert of its graft a group is.
        by_router_G: Whether the router's scores open the graft.
        takes_G: 1 where a group takes the routed part away in the measure of its openness.
    """

    weight_GD: Tensor
    bias_G: Tensor
    routers: tuple[Tensor, Tensor] | None
    place_G: Tensor
    by_router_G: Tensor
    takes_G: Tensor
    any_takes: bool

    def weigh(self, x_GTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much each expert counts, and its part of how far its graft is open."""
        x_GTD = x_GTD.float()
        score_GT = (x_GTD @ self.weight_GD[..., None])[..., 0] + self.bias_G[:, None]
        if self.routers is None:
            open_GT = torch.sigmoid(score_GT)
            return open_GT, self.takes_G[:, None] * open_GT
        weight_GKD, bias_GK = self.routers
        score_GTK = x_GTD @ weight_GKD.mT + bias_GK[:, None]
        by_router_GT = self.by_router_G[:, None].expand_as(score_GT)
        open_GT = torch.sigmoid(torch.where(by_router_GT, score_GTK.logsumexp(dim=-1), score_GT))
        place_GT1 = self.place_G[:, None, None].expand(*score_GT.shape, 1)
        share_GT = score_GTK.softmax(dim=-1).gather(-1, place_GT1)[..., 0]
        return share_GT * open_GT, self.takes_G[:, None] * open_GT


@dataclass(frozen=True, eq=False)
class _Grafts:
    """The grafts of one layer, over all groups; a group is one expert of one graft.

    Attributes:
        groups: Its rows.
        dense: The groups that are copies of an expert, with their tensors.
        stacks: Low-rank factors by projection.
        experts: The base's experts and the groups that started as each.
        stacked: Their weights (G, I, O) and biases by projection, where they are small; empty =
            ``experts`` are run one after another.
        gates: How much each group counts.
        begun: The base's experts and the groups that count as far as they have moved from each.
    """

    groups: _Groups
    dense: tuple[tuple[int, Mapping[str, Tensor]], ...]
    stacks: Mapping[str, _Stack]
    experts: tuple[tuple[int, Tensor], ...]
    stacked: Mapping[str, tuple[Tensor, Tensor | None]]
    gates: _Gates
    begun: tuple[tuple[int, Tensor], ...] = ()


class Assignment:
    """Which model each row of a batch has, with the tensors that this takes.

    It stays the same from step to step until a row joins or leaves.
    """

    def __init__(
        self,
        view: MoEView,
        models: Sequence[RowValues],
        experts: Sequence[Sequence[Mapping[str, Tensor]]],
    ) -> None:
        """Gather what rows of these models read.

        Args:
            view: The base.
            models: The model of each row.
            experts: The tensors of each expert of each MoE layer of the base.
        """
        device = next(view.model.parameters()).device
        self.num_rows = len(models)
        rows: dict[int, list[int]] = {}
        for row, model in enumerate(models):
            rows.setdefault(id(model), []).append(row)
        own = [(models[found[0]], found) for found in rows.values()]
        paths = dict.fromkeys(path for model, _ in own for path in model.linear)
        self.linear: dict[str, tuple[_Groups, _Stack]] = {}
        made: dict[tuple[int, ...], tuple[_Groups, list[int]]] = {}
        for path in paths:
            having = [(model, found) for model, found in own if path in model.linear]
            key = tuple(id(model) for model, _ in having)
            if key not in made:
                made[key] = _cut([found for _, found in having], device)
            groups, which = made[key]
            factors = [having[number][0].linear[path] for number in which]
            self.linear[path] = (groups, _stack(factors, device))
        self.grafts: dict[int, _Grafts] = {}
        for index in range(len(view.layers)):
            grafted = [
                (model.grafts[index], found) for model, found in own if index in model.grafts
            ]
            if grafted:
                self.grafts[index] = _gather_grafts(grafted, experts[index], device)


class Rows:
    """A base whose forward pass reads the model of each row from an assignment."""

    def __init__(self, view: MoEView) -> None:
        """Hook nothing yet; ``hooked`` does."""
        self.view = view
        self.model: Any = view.model
        self._current: Assignment | None = None
        # Of the base itself: in a body, what stands in the place of a parameter is another one.
        self._experts = [experts_of(layer) for layer in view.layers]

    def assign(self, models: Sequence[RowValues]) -> Assignment:
        """Return what rows of these models read.

        Raises:
            ValueError: A graft stands inside its block.
        """
        grafted = {index for model in models for index in model.grafts}
        check_beside([self.view.layers[index] for index in sorted(grafted)], doing="served")
        return Assignment(self.view, models, self._experts)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let the base's layers look at the assignment while the context lasts."""
        handles = []
        blocks = tuple(f"{path}." for layer in self.view.layers for path in layer.own_paths)
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and not path.startswith(blocks):
                handles.append(module.register_forward_hook(partial(self._add_linear, path)))
        for index, layer in enumerate(self.view.layers):
            hook = partial(self._add_graft, index)
            handles.append(layer.block.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, assignment: Assignment, body: RowValues, /, **inputs: Any) -> Any:
        """Run the base with each row's model.

        Args:
            assignment: Of rows whose models have one body.
            body: One of these: its overrides stand for the base's parameters, its whole model
                for the base.
            inputs: Of the forward pass.
        """
        if body.opened is not None:
            return body.opened.model(**inputs)
        self._current = assignment
        try:
            if body.overrides:
                return functional_call(self.model, dict(body.overrides), args=(), kwargs=inputs)
            return self.model(**inputs)
        finally:
            self._current = None

    def _add_linear(self, path: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._current is None or path not in self._current.linear:
            return None
        groups, stack = self._current.linear[path]
        assert args[0].shape[0] == self._current.num_rows, f"{path} does not see rows"
        return groups.add(output, stack.run(groups.gather(args[0])))

    def _add_graft(
        self, index: int, block: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        if self._current is None or index not in self._current.grafts:
            return None
        x_BSD = args[0] if args else kwargs["hidden_states"]
        assert x_BSD.shape[0] == self._current.num_rows, "a MoE block does not see rows"
        layer, grafts = self.view.layers[index], self._current.grafts[index]
        if isinstance(output, tuple):
            mixed_BSD = self._mix(layer, index, grafts, x_BSD, output[0].view_as(x_BSD))
            return (mixed_BSD.view_as(output[0]), *output[1:])
        return self._mix(layer, index, grafts, x_BSD, output)

    def _mix(
        self, layer: MoELayer, index: int, grafts: _Grafts, x_BSD: Tensor, routed_BSD: Tensor
    ) -> Tensor:
        x_GTD = grafts.groups.gather(x_BSD)
        is_gated = "gate_proj" in self._experts[index][0]
        gate_GTF = self._project(index, grafts, "gate_proj", x_GTD) if is_gated else None
        hidden_GTF = layer.activate(gate_GTF, self._project(index, grafts, "up_proj", x_GTD))
        y_GTD = layer.finish_expert(self._project(index, grafts, "down_proj", hidden_GTF))
        for expert, group_N in grafts.begun:
            y_GTD[group_N] = y_GTD[group_N] - self._begun(layer, index, expert, x_GTD[group_N])
        weight_GT, shut_GT = grafts.gates.weigh(x_GTD)
        own_GTD = weight_GT[..., None] * y_GTD
        if grafts.gates.any_takes:
            own_GTD = own_GTD - shut_GT[..., None] * grafts.groups.gather(routed_BSD)
        return grafts.groups.add(routed_BSD, own_GTD)

    def _begun(self, layer: MoELayer, index: int, expert: int, x_NTD: Tensor) -> Tensor:
        """Run an expert of the base as it is."""
        tensors = self._experts[index][expert]

        def project(local: str, x: Tensor) -> Tensor:
            return functional.linear(x, tensors[local], tensors.get(f"{local}_bias"))

        gate_NTF = project("gate_proj", x_NTD) if "gate_proj" in tensors else None
        hidden_NTF = layer.activate(gate_NTF, project("up_proj", x_NTD))
        return layer.finish_expert(project("down_proj", hidden_NTF))

    def _project(self, index: int, grafts: _Grafts, local: str, x_GTI: Tensor) -> Tensor:
        """Run one projection of every group: the base's expert for all that share it, then LoRA."""
        y_GTO: Tensor | None = None
        if grafts.stacked:
            weight_GIO, bias_G1O = grafts.stacked[local]
            y_GTO = torch.bmm(x_GTI, weight_GIO)
            y_GTO = y_GTO if bias_G1O is None else y_GTO + bias_G1O
        for expert, group_N in () if grafts.stacked else grafts.experts:
            tensors = self._experts[index][expert]
            y_NTO = functional.linear(x_GTI[group_N], tensors[local], tensors.get(f"{local}_bias"))
            if len(group_N) == len(x_GTI):
                y_GTO = y_NTO
                break
            if y_GTO is None:
                y_GTO = y_NTO.new_zeros(*x_GTI.shape[:-1], y_NTO.shape[-1])
            y_GTO[group_N] = y_NTO
        if local in grafts.stacks:
            low_GTO = grafts.stacks[local].run(x_GTI)
            y_GTO = low_GTO.to(x_GTI.dtype) if y_GTO is None else (y_GTO + low_GTO).to(x_GTI.dtype)
        for group, dense in grafts.dense:
            if local in dense:
                own = functional.linear(
                    x_GTI[group].float(), dense[local], dense.get(f"{local}_bias")
                )
                if y_GTO is None:
                    y_GTO = own.new_zeros(*x_GTI.shape[:-1], own.shape[-1]).to(x_GTI.dtype)
                y_GTO[group] = own.to(x_GTI.dtype)
        assert y_GTO is not None
        return y_GTO


def _cut(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[_Groups, list[int]]:
    """Cut the rows of each model into groups of about the mean size."""
    size = -(-sum(map(len, rows)) // len(rows))
    index: list[list[int]] = []
    which: list[int] = []
    place: list[int] = []
    row: list[int] = []
    for number, own in enumerate(rows):
        for start in range(0, len(own), size):
            chosen = own[start : start + size]
            place += [len(index) * size + offset for offset in range(len(chosen))]
            row += chosen
            index.append([*chosen, *[chosen[0]] * (size - len(chosen))])
            which.append(number)
    tensors = (torch.tensor(own, device=device) for own in (index, place, row))
    return _Groups(*tensors), which


def _stack(factors: Sequence[Factors], device: torch.device) -> _Stack:
    """Stack factors; where ranks differ, the lower ones are filled up with zeros."""
    rank = max(own.down_RI.shape[0] for own in factors)
    down, up = [], []
    for own in factors:
        missing = rank - own.down_RI.shape[0]
        down.append(functional.pad(own.down_RI, (0, 0, 0, missing)).t())
        up.append(functional.pad(own.up_OR, (0, missing)).t())
    return _Stack(torch.stack(down).to(device), torch.stack(up).to(device))


def _gather_grafts(
    grafted: Sequence[tuple[RowGraft, Sequence[int]]],
    experts: Sequence[Mapping[str, Tensor]],
    device: torch.device,
) -> _Grafts:
    single = [
        (graft, place, rows) for graft, rows in grafted for place in range(len(graft.members))
    ]
    groups, which = _cut([rows for _, _, rows in single], device)
    members = [(single[number][0], single[number][1]) for number in which]
    own: list[Member] = [graft.members[place] for graft, place in members]
    stacks = {}
    for local in dict.fromkeys(local for member in own for local in member.factors):
        template = next(member.factors[local] for member in own if local in member.factors)
        none = Factors(torch.zeros_like(template.down_RI), torch.zeros_like(template.up_OR))
        stacks[local] = _stack([member.factors.get(local, none) for member in own], device)
    dense = tuple((group, member.dense) for group, member in enumerate(own) if member.dense)
    by_expert: dict[int, list[int]] = {}
    for group, member in enumerate(own):
        if not member.dense:
            by_expert.setdefault(member.expert, []).append(group)
    started = tuple(
        (expert, torch.tensor(found, device=device)) for expert, found in by_expert.items()
    )
    stacked = {}
    if len(by_expert) > 1 and not dense:
        stacked = _stack_experts([experts[member.expert] for member in own])
    by_begun: dict[int, list[int]] = {}
    for group, (graft, place) in enumerate(members):
        if graft.settings.mix == "difference":
            by_begun.setdefault(graft.members[place].expert, []).append(group)
    begun = tuple((expert, torch.tensor(g, device=device)) for expert, g in by_begun.items())
    gates = _gather_gates(members, device)
    return _Grafts(groups, dense, stacks, started, stacked, gates, begun)


def _stack_experts(
    experts: Sequence[Mapping[str, Tensor]],
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Stack the experts of all groups; nothing where that takes more than it saves.

    One product over many small experts spares the cost of starting each. Large ones take so long
    that this does not count, and their copies would fill the memory.
    """
    if sum(tensor.nbytes for own in experts for tensor in own.values()) > _STACKED_BYTES:
        return {}
    stacked: dict[str, tuple[Tensor, Tensor | None]] = {}
    for local in ("gate_proj", "up_proj", "down_proj"):
        if local in experts[0]:
            weight_GIO = torch.stack([own[local].detach() for own in experts]).mT
            name = f"{local}_bias"
            has_bias = name in experts[0]
            bias_G1O = torch.stack([own[name].detach() for own in experts]) if has_bias else None
            stacked[local] = (weight_GIO, None if bias_G1O is None else bias_G1O[:, None])
    return stacked


def _gather_gates(members: Sequence[tuple[RowGraft, int]], device: torch.device) -> _Gates:
    grafts = [graft for graft, _ in members]
    # Grafts that are always open and have one expert read no input; a zero stands for any width.
    parts = [own["weight"] for graft in grafts for own in (graft.gate, graft.router) if own]
    width = parts[0].shape[-1] if parts else 1
    weight_GD = torch.zeros(len(grafts), width)
    bias_G = torch.zeros(len(grafts))
    most = max((len(graft.router["weight"]) for graft in grafts if graft.router), default=0)
    weight_GKD = torch.zeros(len(grafts), most, width)
    bias_GK = torch.full((len(grafts), most), -torch.inf)
    by_router_G = torch.zeros(len(grafts), dtype=torch.bool)
    for group, graft in enumerate(grafts):
        if graft.settings.gate == "none":
            bias_G[group] = torch.inf
        elif graft.gate:
            weight_GD[group] = graft.gate["weight"]
            bias_G[group] = graft.gate.get("bias", torch.zeros(()))
        else:
            by_router_G[group] = True
        if most and graft.router:
            count = len(graft.router["weight"])
            weight_GKD[group, :count] = graft.router["weight"]
            bias_GK[group, :count] = graft.router.get("bias", torch.zeros(()))
        elif most:
            bias_GK[group, 0] = 0.0
    # One expert of a graft takes the routed part away, or it would be taken several times.
    takes = [graft.settings.mix == "convex" and place == 0 for graft, place in members]
    return _Gates(
        weight_GD.to(device),
        bias_G.to(device),
        (weight_GKD.to(device), bias_GK.to(device)) if most else None,
        torch.tensor([place for _, place in members], device=device),
        by_router_G.to(device),
        torch.tensor(takes, device=device).float(),
        any(takes),
    )
