"""A base whose frozen experts are where a recipe says: in memory, or mapped from disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from orchard.models.stored.conversion import match_checkpoint
from orchard.models.stored.expert_cache import open_cache
from orchard.models.stored.loading import Base, load_base
from orchard.models.stored.mapping import map_tensors
from orchard.models.stored.submodel import experts_dtype, load_skeleton
from orchard.models.trainable.targets import ALL, EXPERTS, LoraSettings
from orchard.models.view.moe import MoEView
from orchard.models.view.storage import FusedExperts
from orchard.trees import digest


@dataclass(frozen=True)
class Placement:
    """Where the frozen experts of a base are.

    Attributes:
        kind: ``memory`` or ``mapped``.
        cache: The folder of the fused cache; "" = beside the checkpoint.
    """

    kind: str = "memory"
    cache: str = ""


def check_placement(placement: Placement, lora: LoraSettings, *, device: str) -> None:
    """Check where experts should be against what is trained and where it runs.

    Raises:
        ValueError: Experts that are trained themselves cannot be on disk; or the device is no CPU.
    """
    if placement.kind == "memory":
        return
    if named := {ALL, EXPERTS} & {*lora.full}:
        raise ValueError(
            f"model.placement must be memory with {min(named)} in model.full_targets, got "
            f"{placement.kind}; what is trained itself is in memory"
        )
    if placement.kind == "mapped" and device != "cpu":
        raise ValueError(
            f"model.device must be cpu with model.placement = mapped, got {device}; "
            "choose offload for a GPU"
        )


def open_base(
    path: str, *, dtype: str, device: str = "cpu", placement: Placement | None = None
) -> Base:
    """Load a base model, frozen, in ``dtype``, with its experts where they should be.

    Its values, and its digest, do not depend on that.

    Args:
        path: Folder, hub name, or ``orchard:tiny``.
        dtype: ``float32`` or ``bfloat16``.
        device: Where to put it.
        placement: Of its experts; None = in memory.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is not a usable Mixture-of-Experts model; or see ``open_cache``.
    """
    placement = placement or Placement()
    if placement.kind == "memory":
        return load_base(path, dtype=dtype, device=device)
    view = _map_base(path, dtype=dtype, cache=placement.cache)
    state = {**dict(view.model.named_parameters()), **dict(view.model.named_buffers())}
    return Base(view, digest(state))


def _map_base(path: str, *, dtype: str, cache: str) -> MoEView:
    stored = match_checkpoint(path)
    skeleton = load_skeleton(stored, dtype=dtype)
    dtypes = {name: experts_dtype(skeleton.model, name, dtype) for name in stored.experts}
    places = open_cache(stored, dtypes, folder=cache).tensors
    mapped = dict(zip(places, map_tensors(places.values()), strict=True))
    layers = []
    for layer in skeleton.layers:
        for attribute, experts in stored.parameters(layer).items():
            _put(layer.experts, attribute, mapped[experts.name])
        layers.append(replace(layer, storage=FusedExperts(layer.experts)))
    return MoEView(skeleton.model, tuple(layers))


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
