"""Every tensor of a model comes from its checkpoint, or the checkpoint is refused by names.

transformers gives a random value to what a checkpoint lacks, and goes on. So before any weight is
read:

1. each name in the headers of the files is followed to its place in the model, by transformers'
   own renamings and conversions: a list of experts must have every number once, all of one shape,
   and no two tensors may become one;
2. transformers loads the model from tensors that have shapes and no values, and tells which
   parameters nothing came for, and which came in another shape.

Buffers that are computed and tied weights count as there, because they are for transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from orchard.library_errors import first_line
from orchard.models.stored.destinations import (
    and_others,
    check_destinations,
    find_destinations,
    incomplete,
    listed,
)
from orchard.models.stored.sources import without_reports
from orchard.models.stored.tensors import StoredTensor


def check_complete(model: Any, tensors: Mapping[str, StoredTensor], *, path: str) -> list[str]:
    """Check that a checkpoint has every tensor of a model, in its shape.

    Args:
        model: The whole model, on the ``meta`` device.
        tensors: What the checkpoint holds.
        path: What the user calls it.

    Returns:
        The tensors that the model has no use for.

    Raises:
        ValueError: A tensor is missing, or there are two of it, or it has another shape or no
            real numbers; the message has the names.
    """
    destined = find_destinations(model, tensors)
    state = model.state_dict()
    alike = check_destinations(destined, state, tensors, path=path)
    # Lists of experts take most of the time, and one shows what the conversion makes of all.
    shown = {name for name, other in alike.items() if name != other}
    empty = {
        key: torch.empty(tensors[key].shape, dtype=tensors[key].dtype, device="meta")
        for key, (name, _) in destined.keys.items()
        if name not in shown
    }
    try:
        with without_reports():
            _, found = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=empty,
                device_map="meta",
                experts_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever a conversion makes of tensors that do not fit it
        raise ValueError(
            f"model.path must hold tensors that its model can be made of, got {path} "
            f"({first_line(error)}); download it again, or choose another checkpoint"
        ) from error
    check_loaded({**found, "missing_keys": {*found["missing_keys"]} - shown}, path=path)
    # transformers keeps silent of some that are known to be there, such as layers of DeepSeek-V3.
    return [
        key
        for key, (name, _) in destined.keys.items()
        if name not in state and not key.endswith("rotary_emb.inv_freq")
    ]


def check_loaded(found: Mapping[str, Any], *, path: str) -> None:
    """Refuse what transformers says of a model that it loaded.

    Args:
        found: Its loading info.
        path: What the user calls the checkpoint.

    Raises:
        ValueError: A tensor of the model did not come from the checkpoint.
    """
    if missing := sorted(found["missing_keys"]):
        raise incomplete(path, missing)
    if mismatched := sorted(found["mismatched_keys"]):
        name, got, wanted = mismatched[0]
        others = [other for other, *_ in mismatched[1:]]
        raise ValueError(
            f"{name} must have shape {tuple(wanted)}, as config.json says, got {tuple(got)} in "
            f"{path}{and_others(others)}; download both again"
        )
    if errors := list(found.get("error_msgs", ())):
        raise ValueError(
            f"model.path must hold tensors that its model can be made of, got {path} "
            f"({' '.join(str(errors[0]).split())}); download it again"
        )


def extra_notes(names: Sequence[str], files: Sequence[str], *, path: str) -> tuple[str, ...]:
    """Say what of a checkpoint is not used; nothing where all is.

    Args:
        names: Tensors that the model has no use for.
        files: Files beside those that the index lists.
        path: What the user calls the checkpoint.
    """
    notes = []
    if names:
        notes.append(
            f"{path} holds {len(names)} tensors that its model does not use, such as layers that "
            f"predict further tokens; they are not read: {listed(names)}"
        )
    if files:
        notes.append(
            f"{path} holds {len(files)} safetensors files beside those of its model; they are not "
            f"read: {listed(files)}"
        )
    return tuple(notes)
