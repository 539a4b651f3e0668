"""Where a checkpoint on disk keeps each expert, as transformers' own conversions tell.

Most checkpoints hold one tensor per expert and projection, others one stack of all experts; the
model holds fused parameters with one slice per expert. Which conversion leads from one to the other
is in transformers; here it is run on the tensors of a single expert, which gives that expert's
slice. Sound for operations that keep experts apart; any other is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from orchard.models.stored.destinations import (
    check_destinations,
    expert_number,
    find_destinations,
)
from orchard.models.stored.sources import build_view, load_config
from orchard.models.stored.tensors import Checkpoint, open_checkpoint
from orchard.models.view.moe import MoELayer, MoEView


@dataclass(frozen=True)
class StoredExperts:
    """One fused parameter, read expert by expert.

    Attributes:
        name: As in ``model.named_parameters()``.
        shape: Of the whole parameter; experts come first.
        sources: For each pattern of the converter its keys: one per expert, or one stack of all.
        converter: None where the checkpoint holds the parameter as it is.
    """

    name: str
    shape: tuple[int, ...]
    sources: Mapping[str, tuple[str, ...]]
    converter: WeightConverter | None

    @property
    def is_listed(self) -> bool:
        """Whether the checkpoint has a tensor for each expert, not a stack of all."""
        operations = self.converter.operations if self.converter else [None]
        return isinstance(operations[0], MergeModulelist)

    def read(self, checkpoint: Checkpoint, expert: int) -> Tensor:
        """Read one expert's slice in the layout of the model, without the expert dimension.

        Args:
            checkpoint: Where the sources are.
            expert: Its id, in 0..E-1.
        """
        tensors = {}
        for pattern, keys in self.sources.items():
            key = keys[expert] if self.is_listed else keys[0]
            tensors[pattern] = checkpoint.read(key, index=None if self.is_listed else expert)
        return self.convert(tensors)

    def check(self, checkpoint: Checkpoint) -> None:
        """Check that one expert's tensors give one slice, without reading a tensor.

        Raises:
            ValueError: They do not.
        """
        num_experts = self.shape[0]
        tensors = {}
        for pattern, keys in self.sources.items():
            shape = checkpoint.tensors[keys[0]].shape
            is_whole = (
                len(keys) == num_experts
                and all(expert_number(key) == expert for expert, key in enumerate(keys))
                and len({checkpoint.tensors[key].shape for key in keys}) == 1
                if self.is_listed
                else len(keys) == 1 and shape[:1] == (num_experts,)
            )
            if not is_whole:
                raise ValueError(
                    f"checkpoint must hold {num_experts} experts for {self.name}, "
                    f"got {len(keys)} tensors of shape {shape}; download it again"
                )
            shape = shape if self.is_listed else shape[1:]
            tensors[pattern] = torch.empty(shape, device="meta")
        try:
            got = tuple(self.convert(tensors).shape)
        except (RuntimeError, ValueError, IndexError, KeyError, StopIteration) as error:
            raise _unreadable(self.name, f"a conversion that fails ({error})") from error
        if got != self.shape[1:]:
            raise _unreadable(self.name, f"a slice of shape {got}, not {self.shape[1:]}")

    def convert(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Make one expert's slice of what the checkpoint keeps of it, by pattern."""
        if self.converter is None:
            (tensor,) = tensors.values()
            return tensor
        converter = copy.deepcopy(self.converter)
        for pattern, tensor in tensors.items():
            part = tensor if self.is_listed else tensor.unsqueeze(0)
            converter.add_tensor(self.name, pattern, pattern, part)  # type: ignore[arg-type]
        # An operation that asks for the parameter's shape is asking for one expert's.
        one = torch.empty((1, *self.shape[1:]), device="meta")
        model = SimpleNamespace(get_parameter=lambda name: one)
        result: Any = converter.convert(self.name, model=model)[self.name]
        (fused,) = result if isinstance(result, list) else (result,)
        return cast(Tensor, fused).squeeze(0)


@dataclass(frozen=True)
class StoredModel:
    """What each tensor of a checkpoint is in the model.

    Attributes:
        source: The folder that holds weights and configuration.
        whole: The whole model, without weights.
        checkpoint: The files.
        names: Key to the model's name, for all that is not a routed expert; keys that the model
            has no use for map to themselves or to a name it lacks.
        converted: The keys among them that pass through more than a renaming.
        experts: The fused parameters, by name.
    """

    source: str
    whole: MoEView
    checkpoint: Checkpoint
    names: Mapping[str, str]
    converted: frozenset[str]
    experts: Mapping[str, StoredExperts]

    def parameters(self, layer: MoELayer) -> dict[str, StoredExperts]:
        """Return the fused parameters of one layer by their attribute in ``layer.experts``."""
        prefix = f"{find_path(layer)}."
        return {
            name.removeprefix(prefix): stored
            for name, stored in self.experts.items()
            if name.startswith(prefix)
        }


def find_path(layer: MoELayer) -> str:
    """Return the path of a layer's experts in ``model.named_modules()``."""
    own = next(name for name, child in layer.block.named_children() if child is layer.experts)
    return f"{layer.path}.{own}"


def match_checkpoint(path: str | StoredModel) -> StoredModel:
    """Find where a checkpoint keeps each routed expert; reads no tensor.

    Args:
        path: Folder, hub name, or ``orchard:tiny``; what was found before is returned as it is.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is no Mixture-of-Experts; or experts are listed, not fused, or stored in a
            way that cannot be read one by one; or some are missing.
    """
    if isinstance(path, StoredModel):
        return path
    checkpoint = open_checkpoint(path)
    source = str(checkpoint.folder)
    view = build_view(load_config(source), path)
    check_fused(view)
    model: Any = view.model
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    routed = view.routed_parameters()
    destined = find_destinations(model, checkpoint.tensors)
    check_destinations(destined, model.state_dict(), checkpoint.tensors, path=path)
    by_pattern = destined.converters
    names = {key: name for key, (name, _) in destined.keys.items() if name not in routed}
    converted = {key for key in names if destined.keys[key][1] is not None}
    sources = destined.sources()
    experts = {}
    for name in sorted(routed):
        found = {pattern: tuple(keys) for pattern, keys in sources.get(name, {}).items()}
        experts[name] = _store(name, tuple(shapes[name]), found, by_pattern, checkpoint)
    return StoredModel(source, view, checkpoint, names, frozenset(converted), experts)


def check_fused(view: MoEView) -> None:
    """Check that every layer holds its experts in fused parameters, and nothing else beside them.

    Raises:
        ValueError: One does not.
    """
    for layer in view.layers:
        if not layer.is_fused:
            raise ValueError(
                f"experts of {layer.name} must be fused parameters to be read one by one, got "
                f"{type(layer.experts).__name__}; load the whole model instead"
            )
        known = {id(parameter) for parameter in layer.storage.parameters()}
        own = layer.experts
        named = [*own.named_parameters(recurse=False), *own.named_buffers(recurse=False)]
        if others := [name for name, tensor in named if id(tensor) not in known]:
            raise ValueError(
                f"experts of {layer.name} must hold projections only, got {', '.join(others)}; "
                "load the whole model instead"
            )


def _store(
    name: str,
    shape: tuple[int, ...],
    sources: dict[str, tuple[str, ...]],
    by_pattern: Mapping[str, WeightConverter],
    checkpoint: Checkpoint,
) -> StoredExperts:
    if not sources:
        raise ValueError(
            f"checkpoint must hold the experts of {name}, got none of them; download it again"
        )
    converter = None if "" in sources else by_pattern[next(iter(sources))]
    keys = [key for group in sources.values() for key in group]
    if len(sources) > 1 and converter is None:
        raise _unreadable(name, f"{', '.join(keys)} for it")
    if converter is not None:
        if len(converter.target_patterns) > 1:
            raise _unreadable(name, "a conversion to several parameters")
        if set(sources) != set(converter.source_patterns):
            raise _unreadable(name, f"tensors for {', '.join(sources)} only")
        for position, operation in enumerate(converter.operations):
            _check_operation(name, operation, position)
    stored = StoredExperts(name, shape, sources, converter)
    stored.check(checkpoint)
    return stored


def _check_operation(name: str, operation: object, position: int) -> None:
    """Refuse an operation that could move a value from one expert to another."""
    if isinstance(operation, MergeModulelist):
        is_sound = position == 0 and operation.dim == 0
    elif isinstance(operation, Concatenate):
        is_sound = operation.dim in (1, 2) and operation.num_shards_attribute is None
    elif isinstance(operation, Interleave):
        is_sound = operation.dim in (1, 2)
    elif isinstance(operation, Transpose):
        is_sound = {operation.dim0, operation.dim1} == {1, 2}
    else:
        is_sound = False
    if not is_sound:
        raise _unreadable(name, f"the conversion {operation!r}")


def _unreadable(name: str, got: str) -> ValueError:
    return ValueError(
        f"checkpoint must store {name} so that each expert can be read alone, got {got}; "
        "load the whole model instead"
    )
