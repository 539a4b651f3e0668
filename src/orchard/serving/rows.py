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

from orchard.models.view.moe import MoELayer, MoEView
from orchard.serving.values import Factors, Member, RowGraft, RowValues


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
        """Return the rows of each group, (G, C * S, D)."""
        groups, size = self.index_GC.shape
        rows = x_BSD[self.index_GC.flatten()]
        return rows.reshape(groups, size * x_BSD.shape[1], -1)

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
class _Grafts:
    """The grafts of one layer, over all groups; a group is one expert of one graft."""

    groups: _Groups
    members: tuple[tuple[RowGraft, int], ...]
    stacks: Mapping[str, _Stack]
    experts: tuple[tuple[int, Tensor], ...]


class Assignment:
    """Which model each row of a batch has, with the tensors that this takes.

    It stays the same from step to step until a row joins or leaves.
    """

    def __init__(self, view: MoEView, models: Sequence[RowValues]) -> None:
        """Gather what rows of these models read.

        Args:
            view: The base.
            models: The model of each row.
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
                self.grafts[index] = _gather_grafts(grafted, device)


class Rows:
    """A base whose forward pass reads the model of each row from an assignment."""

    def __init__(self, view: MoEView) -> None:
        """Hook nothing yet; ``hooked`` does."""
        self.view = view
        self.model: Any = view.model
        self._current: Assignment | None = None
        # Of the base itself: in a body, what stands in the place of a parameter is another one.
        self._experts = [
            [layer.expert_tensors(index) for index in range(layer.num_experts)]
            for layer in view.layers
        ]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let the base's layers look at the assignment while the context lasts."""
        handles = []
        blocks = tuple(f"{layer.path}." for layer in self.view.layers)
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

    def run(self, assignment: Assignment, overrides: Mapping[str, Tensor], /, **inputs: Any) -> Any:
        """Run the base with each row's model, over parameters that stand in for the base's own."""
        self._current = assignment
        try:
            if overrides:
                return functional_call(self.model, dict(overrides), args=(), kwargs=inputs)
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
            return (self._mix(layer, index, grafts, x_BSD, output[0]), *output[1:])
        return self._mix(layer, index, grafts, x_BSD, output)

    def _mix(
        self, layer: MoELayer, index: int, grafts: _Grafts, x_BSD: Tensor, routed_BSD: Tensor
    ) -> Tensor:
        x_GTD = grafts.groups.gather(x_BSD)
        is_gated = "gate_proj" in self._experts[index][0]
        gate_GTF = self._project(index, grafts, "gate_proj", x_GTD) if is_gated else None
        hidden_GTF = layer.activate(gate_GTF, self._project(index, grafts, "up_proj", x_GTD))
        y_GTD = layer.finish_expert(self._project(index, grafts, "down_proj", hidden_GTF))
        weights, shut = zip(
            *(_weigh(graft, place, x_GTD[g]) for g, (graft, place) in enumerate(grafts.members)),
            strict=True,
        )
        own_GTD = torch.stack(weights)[..., None] * y_GTD
        if any(graft.settings.mix == "convex" for graft, _ in grafts.members):
            routed_GTD = grafts.groups.gather(routed_BSD)
            own_GTD = own_GTD - torch.stack(shut)[..., None] * routed_GTD
        return grafts.groups.add(routed_BSD, own_GTD)

    def _project(self, index: int, grafts: _Grafts, local: str, x_GTI: Tensor) -> Tensor:
        """Run one projection of every group: the base's expert for all that share it, then LoRA."""
        y_GTO: Tensor | None = None
        for expert, group_N in grafts.experts:
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
        for group, (graft, place) in enumerate(grafts.members):
            dense = graft.members[place].dense
            if local in dense:
                own = functional.linear(
                    x_GTI[group].float(), dense[local], dense.get(f"{local}_bias")
                )
                if y_GTO is None:
                    y_GTO = own.new_zeros(*x_GTI.shape[:-1], own.shape[-1]).to(x_GTI.dtype)
                y_GTO[group] = own.to(x_GTI.dtype)
        assert y_GTO is not None
        return y_GTO


def _weigh(graft: RowGraft, place: int, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much one expert of a graft counts, and its part of how far the graft is open."""
    kind = graft.settings.gate
    share_T = torch.ones(x_TD.shape[:-1], device=x_TD.device)
    scores_TG: Tensor | None = None
    if graft.router:
        router = graft.router
        scores_TG = functional.linear(x_TD.float(), router["weight"], router.get("bias"))
        share_T = scores_TG.softmax(dim=-1)[..., place]
    if kind == "none":
        open_T = torch.ones_like(share_T)
    elif graft.gate:
        gate = graft.gate
        score_T1 = functional.linear(x_TD.float(), gate["weight"][None], gate.get("bias"))
        open_T = torch.sigmoid(score_T1[..., 0])
    else:
        assert scores_TG is not None
        open_T = torch.sigmoid(scores_TG.logsumexp(dim=-1))
    is_convex = graft.settings.mix == "convex"
    # One expert of a graft takes the routed part away, or it would be taken several times.
    shut_T = open_T if is_convex and place == 0 else torch.zeros_like(open_T)
    return share_T * open_T, shut_T


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
    grafted: Sequence[tuple[RowGraft, Sequence[int]]], device: torch.device
) -> _Grafts:
    single = [
        (graft, place, rows) for graft, rows in grafted for place in range(len(graft.members))
    ]
    groups, which = _cut([rows for _, _, rows in single], device)
    members = tuple((single[number][0], single[number][1]) for number in which)
    own: list[Member] = [graft.members[place] for graft, place in members]
    stacks = {}
    for local in dict.fromkeys(local for member in own for local in member.factors):
        template = next(member.factors[local] for member in own if local in member.factors)
        none = Factors(torch.zeros_like(template.down_RI), torch.zeros_like(template.up_OR))
        stacks[local] = _stack([member.factors.get(local, none) for member in own], device)
    by_expert: dict[int, list[int]] = {}
    for group, member in enumerate(own):
        if not member.dense:
            by_expert.setdefault(member.expert, []).append(group)
    experts = tuple(
        (expert, torch.tensor(found, device=device)) for expert, found in by_expert.items()
    )
    return _Grafts(groups, members, stacks, experts)
