"""What each tensor of a checkpoint becomes in the model, told from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from orchard.models.stored.tensors import StoredTensor

_SHOWN = 6  # names in a message; the count of all is beside them
_NUMBER = re.compile(r"(?<=\.)(expert_)?(\d+)(?=\.)")


@dataclass(frozen=True)
class Destinations:
    """Where transformers puts each tensor of a checkpoint.

    Attributes:
        keys: Name in the checkpoint, in the order in which transformers reads them, to the model's
            name and the pattern of the converter that it passes through, None for a renaming.
            Keys that the model has no use for map to a name it lacks.
        converters: By pattern.
    """

    keys: Mapping[str, tuple[str, str | None]]
    converters: Mapping[str, WeightConverter]

    def sources(self) -> dict[str, dict[str, list[str]]]:
        """Return the keys of each name of the model by pattern; a renaming's is ``""``."""
        found: dict[str, dict[str, list[str]]] = {}
        for key, (name, pattern) in self.keys.items():
            found.setdefault(name, {}).setdefault(pattern or "", []).append(key)
        return found


def find_destinations(model: Any, keys: Iterable[str]) -> Destinations:
    """Find what each tensor of a checkpoint becomes in a model, from the names alone."""
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, tuple[str, str | None]] = {}
    # In transformers' order: of experts, and of what a renaming has seen before.
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        found[key] = name, pattern
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    return Destinations(found, by_pattern)


def check_destinations(
    destined: Destinations,
    state: Mapping[str, Tensor],
    tensors: Mapping[str, StoredTensor],
    *,
    path: str,
) -> dict[str, str]:
    """Check that no tensor of a model is in a checkpoint twice, and every list of experts whole.

    Args:
        destined: Where each tensor goes.
        state: The model's tensors, on the ``meta`` device.
        tensors: The checkpoint's.
        path: What the user calls it.

    Returns:
        Names whose lists of experts are whole, to the first one that is made of tensors of the
        same shapes by the same conversion, which may be itself.

    Raises:
        ValueError: They are not, or a tensor of real numbers is stored as whole ones.
    """
    missing: list[str] = []
    first: dict[object, str] = {}
    alike: dict[str, str] = {}
    for name, by_pattern in destined.sources().items():
        if name not in state:
            continue
        keys = [key for own in by_pattern.values() for key in own]
        for key in keys:
            if state[name].is_floating_point() and not tensors[key].dtype.is_floating_point:
                raise ValueError(
                    f"{key} must hold real numbers, got {tensors[key].dtype} in {path}; "
                    "choose a checkpoint that is not quantized"
                )
        if "" in by_pattern:
            if len(keys) > 1:
                raise _ambiguous(name, keys, path)
            continue
        converter = destined.converters[next(iter(by_pattern))]
        merge = converter.operations[0]
        if not isinstance(merge, MergeModulelist) or merge.dim != 0:
            continue
        num_experts = len(state[name])
        lacking: list[str] = []
        for pattern in converter.source_patterns:
            if pattern in by_pattern:
                lacking += _check_list(name, by_pattern[pattern], num_experts, tensors, path)
            else:
                # Its names are those of another projection; only the pattern tells them.
                lacking.append(f"{pattern} for {name}")
        missing += lacking
        if not lacking and len(converter.target_patterns) == 1:
            shapes = [(pattern, tensors[own[0]].shape) for pattern, own in by_pattern.items()]
            alike[name] = first.setdefault((tuple(shapes), state[name].shape), name)
    if missing:
        raise incomplete(path, missing)
    return alike


def _check_list(
    name: str,
    keys: Sequence[str],
    num_experts: int,
    tensors: Mapping[str, StoredTensor],
    path: str,
) -> list[str]:
    """Check one tensor for each expert; return the names of those that are missing."""
    by_number: dict[int, str] = {}
    for key in keys:
        number = expert_number(key)
        if number in by_number:
            raise _ambiguous(name, [by_number[number], key], path)
        by_number[number] = key
    if more := [by_number[number] for number in sorted(by_number) if number >= num_experts]:
        raise ValueError(
            f"{path} must hold {num_experts} experts for {name}, as config.json says, got "
            f"{more[0]}{and_others(more[1:])}; download both again"
        )
    first, shape = keys[0], tensors[keys[0]].shape
    for key in keys:
        if tensors[key].shape != shape:
            raise ValueError(
                f"experts of one layer must have one shape, got {shape} for {first} and "
                f"{tensors[key].shape} for {key} in {path}; download it again"
            )
    *_, place = _NUMBER.finditer(first)
    return [
        f"{first[: place.start(2)]}{number}{first[place.end() :]}"
        for number in range(num_experts)
        if number not in by_number
    ]


def expert_number(key: str) -> int:
    """Return the number of the expert in a checkpoint's name for a tensor of one."""
    *_, place = _NUMBER.finditer(key)
    return int(place[2])


def _ambiguous(name: str, keys: Sequence[str], path: str) -> ValueError:
    return ValueError(
        f"{path} must hold one tensor for {name}, got {listed(keys)}; "
        "remove what is there twice, or download it again"
    )


def incomplete(path: str, missing: Sequence[str]) -> ValueError:
    """Return the error of a checkpoint that lacks tensors."""
    count = f"{len(missing)} tensors" if len(missing) > 1 else "a tensor"
    return ValueError(
        f"model.path must hold every tensor of its model, got {path} without {count}: "
        f"{listed(missing)}; download it again, or correct its config.json"
    )


def listed(names: Sequence[str]) -> str:
    """Return some names, and how many more there are."""
    more = len(names) - _SHOWN
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


def and_others(names: Sequence[str]) -> str:
    """Return other names in parentheses, or nothing."""
    return f" (and {listed(names)})" if names else ""
