"""Parts of a trained model on disk, as ``orchard export`` writes them without their base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from orchard.models.stored.finiteness import is_finite
from orchard.models.trainable.slots import lora_slots
from orchard.models.trainable.targets import LoraSettings, find_targets, inject_lora
from orchard.models.view.moe import MoEView
from orchard.trees import Tree

GRAFT_FORMAT, ADAPTER_FORMAT = "orchard-graft-1", "orchard-adapter-1"
ADAPTER_PREFIX = "base_model.model."
_ADAPTER, _GRAFT = "adapter_model.safetensors", "graft.safetensors"


@dataclass(frozen=True)
class Part:
    """What an exported part says of itself.

    Attributes:
        folder: Where it is.
        kind: ``GRAFT_FORMAT`` or ``ADAPTER_FORMAT``.
        base_digest: Of the base that it was trained on.
        client: Whose it is; None = everybody's.
        round_number: After which it was written.
        recipe: Of its run, as TOML, without the folders of the machine.
        about: All that its description says.
    """

    folder: Path
    kind: str
    base_digest: str
    client: str | None
    round_number: int
    recipe: str
    about: Mapping[str, Any]

    @property
    def is_graft(self) -> bool:
        """Whether it is a client's grafts, and not an adapter."""
        return self.kind == GRAFT_FORMAT


def read_part(folder: Path) -> Part:
    """Read what an exported part says of itself; no tensor is read.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is no part, or its description is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} must be a folder of orchard export --graft or --adapter, got none there; "
            "check the path"
        )
    for name in ("graft.json", "orchard.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            about: dict[str, Any] = json.loads(file.read_bytes())
            found = Part(
                folder,
                str(about.get("format", "")),
                str(about["base_digest"]),
                None if about["client"] is None else str(about["client"]),
                int(about["round"]),
                str(about["recipe"]),
                about,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} must be as orchard export wrote it, got what does not parse; "
                "export it again"
            ) from error
        if found.kind in (GRAFT_FORMAT, ADAPTER_FORMAT):
            return found
        what = "a whole model" if name == "orchard.json" and not found.kind else found.kind
        raise ValueError(
            f"{folder} must be a folder of orchard export --graft or --adapter, got {what}; name "
            "one of these, or export anew with this version"
        )
    raise ValueError(
        f"{folder} must be a folder of orchard export --graft or --adapter, got another; "
        "name one of these"
    )


def check_part(part: Part, base_digest: str, *, what: str) -> None:
    """Check that a part belongs to a base.

    Args:
        part: Which.
        base_digest: Of the base that it is to be put on.
        what: What that base is called.

    Raises:
        ValueError: It was trained on another one.
    """
    if part.base_digest != base_digest:
        raise ValueError(
            f"{part.folder} must be for the base {base_digest[:12]} of {what}, got one for "
            f"{part.base_digest[:12]}; use it on the base that it was trained on"
        )


def check_adapter(part: Part, lora: LoraSettings) -> None:
    """Check that an adapter has the settings under which its values mean the same.

    Raises:
        ValueError: It has others, or is none.
    """
    if part.is_graft:
        raise ValueError(
            f"{part.folder} must be an adapter, got grafts; name a folder of orchard export "
            "--adapter"
        )
    file = part.folder / "adapter_config.json"
    try:
        about = json.loads(file.read_bytes())
        found = int(about["r"]), float(about["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must be as orchard export wrote it, got what does not parse; export it again"
        ) from error
    if found != (lora.rank, lora.alpha) or lora.full:
        own = f"{lora.rank} and {lora.alpha:g}{' with model.full_targets' if lora.full else ''}"
        raise ValueError(
            f"model.lora_rank and model.lora_alpha must be {found[0]} and {found[1]:g}, as in "
            f"{part.folder}, got {own}; set them so"
        )


def read_graft_tensors(part: Part) -> dict[str, Tensor]:
    """Read a graft's tensors, names as on the wire.

    Raises:
        ValueError: The file is damaged, or holds others than its description says.
    """
    file = part.folder / _GRAFT
    tensors = _load(file)
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != part.about["tensors"]:
        raise ValueError(
            f"{file} must hold the tensors that graft.json names, got others; export it again"
        )
    return tensors


def read_adapter(part: Part, view: MoEView, lora: LoraSettings) -> dict[str, Tensor]:
    """Read an adapter's values, names as on the wire.

    Args:
        part: An adapter.
        view: A model of its base's configuration, weights or none, which gets adapters.
        lora: What is adapted.

    Raises:
        ValueError: The file is damaged, or holds more, fewer or other adapters than the model has.
    """
    check_adapter(part, lora)
    modules, parameters = find_targets(view, lora.targets)
    inject_lora(
        view.model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        modules=modules,
        parameters=parameters or None,
    )
    file = part.folder / _ADAPTER
    tensors: Tree = _load(file)
    keys = {
        id(parameter): ADAPTER_PREFIX + path.replace(".default", "", 1)
        for path, parameter in view.model.named_parameters()
    }
    found: dict[str, Tensor] = {}
    known = set()
    for name, slot in lora_slots(view.model, view):
        key = keys[id(slot.parameter)]
        known.add(key)
        if (stored := tensors.get(key)) is None:
            continue  # all that lack are named below
        if stored.shape != slot.parameter.shape:
            raise ValueError(
                f"{key} of {file} must have shape {tuple(slot.parameter.shape)}, got "
                f"{tuple(stored.shape)}; use the recipe that it was trained with"
            )
        found[name] = slot.view(stored).clone().float()
    if missing := sorted(known - set(tensors)):
        raise ValueError(
            f"{file} must have a tensor for every adapter of the recipe, got none for "
            f"{missing[0]} and {len(missing) - 1} others; export it again"
        )
    if unknown := sorted(set(tensors) - known):
        raise ValueError(
            f"every adapter of {file} must be one that the recipe trains, got {unknown[0]}; "
            "add what it is on to model.lora_targets"
        )
    return found


def _load(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} must be a whole safetensors file, got one that does not decode; export it "
            "again"
        ) from error
    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise ValueError(
            f"{file} must hold finite values, got NaN or infinity in {bad[0]}; export it again"
        )
    return tensors
