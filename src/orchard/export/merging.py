"""A base's checkpoint with trained values in it, tensor by tensor in the checkpoint's own layout.

Nothing is held but the values that were trained and one tensor, or one expert of a stack. What was
not trained is copied as it is; of experts that a run keeps in few bits, as it has them. Values are
added in float32 and cast once.

An expert's slice of a fused parameter is made of the checkpoint's tensors by transformers' own
conversions. The way back is found by letting these move numbers of places instead of values, so
that it is right for any conversion that only moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from orchard.export.checking import ReadSlice
from orchard.models.stored.carving import select_rows, with_other_rows
from orchard.models.stored.conversion import StoredExperts, StoredModel
from orchard.models.stored.finiteness import check_finite
from orchard.models.trainable.slots import canonical
from orchard.models.view.moe import MoELayer
from orchard.models.view.routers import find_rows
from orchard.models.view.storage import FusedExperts
from orchard.trees import Tree


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint that is to be written.

    Attributes:
        name: As in the file.
        dtype: As in the file.
        shape: As in the file.
        parts: Yields its values from the first to the last.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Merger:
    """What was trained, beside the base that it was trained on.

    Attributes:
        stored: The base.
        values: Adapters and trained tensors, names as on the wire.
        scale: Of adapters: alpha over rank.
        dtype: Of what is written; None = as the base is stored.
        kept: For each MoE layer the experts that the model holds; None = all.
        read: What reads experts as the run has them; None = they are what the checkpoint has.
    """

    stored: StoredModel
    values: Tree
    scale: float
    dtype: torch.dtype | None = None
    kept: Sequence[Sequence[int]] | None = None
    read: ReadSlice | None = None
    _used: set[str] = field(default_factory=set)
    _last: tuple[str, int, dict[str, Tensor]] | None = None
    _places: dict[str, Tensor] = field(default_factory=dict)

    def entries(self) -> Iterator[Entry]:
        """Yield what is written, in the order of the base's files."""
        routed = self._routed()
        dense = self._dense()
        for key, tensor in self.stored.checkpoint.tensors.items():
            if key in routed:
                yield from routed[key](key, tensor.dtype, tensor.shape)
                continue
            change, rows = dense.get(self.stored.names.get(key, ""), (None, None))
            shape = tensor.shape
            if rows is not None:
                local, experts = rows
                axis = 0 if local == "weight" else len(shape) - 1
                shape = (*shape[:axis], len(experts), *shape[axis + 1 :])
            dtype = self._dtype(tensor.dtype, shape)

            def parts(
                key: str = key,
                dtype: torch.dtype = dtype,
                change: Callable[[Tensor], Tensor] | None = change,
                rows: tuple[str, Sequence[int]] | None = rows,
            ) -> Iterator[Tensor]:
                values = self.stored.checkpoint.read(key)
                if change is not None:
                    values = change(values)
                if rows is not None:
                    values = select_rows(values, *rows)
                yield self._checked(key, values).to(dtype)

            yield Entry(key, dtype, shape, parts)

    def check_used(self, *, but: Collection[str] = ()) -> None:
        """Check that every trained tensor is in what was written, or among ``but``.

        Raises:
            ValueError: One is not; what was written lacks it.
        """
        if missing := sorted(set(self.values) - self._used - set(but)):
            raise ValueError(
                f"every trained tensor must have a place in the exported model, got none for "
                f"{missing[0]} and {len(missing) - 1} others; open the run with the version of "
                "Orchard that trained it"
            )

    def expert(self, layer: MoELayer, expert: int) -> dict[str, Tensor]:
        """Return one expert's slices of its layer's fused parameters, trained, in float32."""
        if self._last is not None and self._last[:2] == (layer.name, expert):
            return self._last[2]
        storage = cast(FusedExperts, layer.storage)
        parameters = self.stored.parameters(layer)
        slices = {
            name: (
                own.read(self.stored.checkpoint, expert)
                if self.read is None
                else self.read(layer.name, name, expert)
            )
            .float()
            .clone()
            for name, own in parameters.items()
        }
        views = storage.split(slices.__getitem__)
        prefix = f"{layer.name}.experts.{expert}."
        for local, view in views.items():
            if (value := self._take(prefix + local)) is not None:
                view.copy_(value)
        for name, locals_ in storage.projections().items():
            delta = self._delta(f"{prefix}{name}")
            if delta is None:
                continue
            for local, own_delta in zip(locals_, storage.halve(delta, locals_), strict=True):
                views[local].add_(own_delta)
        self._last = (layer.name, expert, slices)
        return slices

    def _delta(self, prefix: str) -> Tensor | None:
        a, b = self._take(f"{prefix}.lora_A"), self._take(f"{prefix}.lora_B")
        if a is None or b is None:
            return None
        return self.scale * (b.float() @ a.float())

    def _take(self, name: str) -> Tensor | None:
        if name not in self.values:
            return None
        self._used.add(name)
        return self.values[name]

    def _is_trained(self, layer: MoELayer, expert: int) -> bool:
        prefix = f"{layer.name}.experts.{expert}."
        return any(name.startswith(prefix) for name in self.values)

    def _dtype(self, stored: torch.dtype, shape: tuple[int, ...]) -> torch.dtype:
        if self.dtype is None or not stored.is_floating_point:
            return stored
        # A vector is small, and some families keep theirs in float32.
        is_kept = len(shape) < 2 and stored.itemsize > self.dtype.itemsize
        return stored if is_kept else self.dtype

    def _checked(self, name: str, values: Tensor) -> Tensor:
        check_finite([(name, values)], path=self.stored.source)
        return values

    def _routed(self) -> dict[str, Callable[..., Iterator[Entry]]]:
        """Return, for each key that holds routed experts, what yields its entry."""
        found: dict[str, Callable[..., Iterator[Entry]]] = {}
        for index, layer in enumerate(self.stored.whole.layers):
            kept = range(layer.num_experts) if self.kept is None else self.kept[index]
            for attribute, own in self.stored.parameters(layer).items():
                for pattern, keys in own.sources.items():
                    for place, key in enumerate(keys):

                        def entry(
                            key: str,
                            dtype: torch.dtype,
                            shape: tuple[int, ...],
                            layer: MoELayer = layer,
                            own: StoredExperts = own,
                            attribute: str = attribute,
                            pattern: str = pattern,
                            place: int = place,
                            kept: Sequence[int] = kept,
                        ) -> Iterator[Entry]:
                            experts: Sequence[int] = kept
                            name = key
                            if own.is_listed:
                                if place not in kept:
                                    return
                                experts = (place,)
                                name = own.sources[pattern][list(kept).index(place)]
                            else:
                                shape = (len(kept), *shape[1:])
                            to = self._dtype(dtype, shape)

                            def parts() -> Iterator[Tensor]:
                                for expert in experts:
                                    values = self._part(layer, own, attribute, pattern, expert)
                                    yield self._checked(key, values).to(to)

                            yield Entry(name, to, shape, parts)

                        found[key] = entry
        return found

    def _part(
        self, layer: MoELayer, own: StoredExperts, attribute: str, pattern: str, expert: int
    ) -> Tensor:
        """Return what the checkpoint keeps of one expert behind one pattern."""
        checkpoint = self.stored.checkpoint
        keys = own.sources[pattern]
        if self.read is None and not self._is_trained(layer, expert):
            key = keys[expert] if own.is_listed else keys[0]
            return checkpoint.read(key, index=None if own.is_listed else expert)
        slices = self.expert(layer, expert)
        return self._unfuse(own, slices[attribute])[pattern]

    def _unfuse(self, own: StoredExperts, values: Tensor) -> dict[str, Tensor]:
        shapes = {}
        for pattern, keys in own.sources.items():
            shape = self.stored.checkpoint.tensors[keys[0]].shape
            shapes[pattern] = shape if own.is_listed else shape[1:]
        sizes = [math.prod(shape) for shape in shapes.values()]
        identity = repr((own.converter and own.converter.operations, shapes))
        if identity not in self._places:
            numbers = torch.split(torch.arange(sum(sizes)), sizes)
            numbered = {
                pattern: part.view(shape)
                for (pattern, shape), part in zip(shapes.items(), numbers, strict=True)
            }
            self._places = {
                identity: own.convert(numbered).flatten()
            }  # of the last, to save memory
        flat = torch.empty(sum(sizes))
        flat[self._places[identity]] = values.flatten()
        return {
            pattern: part.view(shape)
            for (pattern, shape), part in zip(shapes.items(), torch.split(flat, sizes), strict=True)
        }

    def _dense(
        self,
    ) -> dict[str, tuple[Callable[[Tensor], Tensor] | None, tuple[str, Sequence[int]] | None]]:
        """Return, for names of the model, what changes them and which rows of them are kept."""
        model = self.stored.whole.model
        names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        found: dict[
            str, tuple[Callable[[Tensor], Tensor] | None, tuple[str, Sequence[int]] | None]
        ] = {}
        for index, layer in enumerate(self.stored.whole.layers):
            rows = find_rows(layer.router, layer.block, num_experts=layer.num_experts)
            for local, (holder, attribute) in rows.items():
                kept = None
                if self.kept is not None and len(self.kept[index]) < layer.num_experts:
                    tensor = getattr(holder, attribute)
                    kept = (
                        local,
                        with_other_rows(self.kept[index], tensor, local, layer.num_experts),
                    )
                change = self._router_change(layer, local)
                found[names[id(getattr(holder, attribute))]] = (change, kept)
        for name in names.values():
            if name not in found and (own := self._dense_change(canonical(name))) is not None:
                found[name] = (own, None)
        keys = {name: key for key, name in self.stored.names.items()}
        for name, (change, rows_kept) in found.items():
            if (change or rows_kept) and keys.get(name) in self.stored.converted:
                raise ValueError(
                    f"checkpoint must store {name}, which was trained, as the model has it, got "
                    f"{keys[name]}; save the base anew with save_original_format=False"
                )
        return found

    def _dense_change(self, name: str) -> Callable[[Tensor], Tensor] | None:
        prefix = name.removesuffix(".weight")
        if f"{prefix}.lora_A" in self.values and name.endswith(".weight"):

            def add(values: Tensor) -> Tensor:
                delta = self._delta(prefix)
                assert delta is not None
                return values.float() + delta

            return add
        if name in self.values:

            def replace(values: Tensor) -> Tensor:
                value = self._take(name)
                assert value is not None
                return value.float().view(values.shape)

            return replace
        return None

    def _router_change(self, layer: MoELayer, local: str) -> Callable[[Tensor], Tensor] | None:
        kind = {"weight": "router", "bias": "router_bias"}.get(local)
        prefix = f"{layer.name}.{kind}."
        if kind is None or not any(name.startswith(prefix) for name in self.values):
            return None

        def change(values: Tensor) -> Tensor:
            values = values.float().clone()
            a = self._take(f"{prefix}lora_A") if local == "weight" else None
            for expert in range(layer.num_experts):
                if (own := self._take(f"{prefix}{expert}")) is not None:
                    values[expert] = own.float().view(values[expert].shape)
                b = self._take(f"{prefix}{expert}.lora_B")
                if a is not None and b is not None:
                    values[expert] += self.scale * (b.float() @ a.float())
            return values

        return change


def mapping_of(names: Mapping[str, Tensor]) -> list[Entry]:
    """Return entries for tensors that are in memory."""
    return [
        Entry(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: (tensor,))  # type: ignore[misc]
        for name, tensor in names.items()
    ]
