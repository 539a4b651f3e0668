"""A base whose frozen experts wait in the host's memory and are on a device while they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from orchard.models.kernels.carrying import Carrier, LayersInTurn
from orchard.models.stored.conversion import StoredExperts, StoredModel
from orchard.models.stored.expert_parts import Parts, decoded
from orchard.models.view.moe import MoEView
from orchard.models.view.offloaded import OffloadedExperts, OnDevice
from orchard.trees import SlicedTensor

_Layer = Mapping[str, StoredExperts]  # attribute to what it holds


def offload(
    skeleton: MoEView,
    stored: StoredModel,
    parts: Parts,
    *,
    dtypes: Mapping[str, torch.dtype],
    carrier: Carrier,
    device: str,
) -> MoEView:
    """Return a skeleton whose layers of experts are brought in turn.

    Args:
        skeleton: The model, with experts on ``meta`` and all else on the device.
        stored: Its checkpoint.
        parts: Of all experts, in the host's memory.
        dtypes: Fused parameters to the dtype that the model has them in.
        carrier: What brings them.
        device: Where the model runs.
    """
    attributes = [stored.parameters(layer) for layer in skeleton.layers]
    turns = LayersInTurn([_flat(own, parts) for own in attributes], carrier)
    layers = []
    for index, (layer, own) in enumerate(zip(skeleton.layers, attributes, strict=True)):
        held = {
            attribute: decoded(
                parts[experts.name], experts, dtypes[experts.name], device=torch.device(device)
            )
            for attribute, experts in own.items()
        }
        storage = OffloadedExperts(
            layer.experts,
            held,
            host=_whole(own, _flat(own, parts), dtypes),
            on_device=_turn(turns, index, own, dtypes),
        )
        layers.append(replace(layer, storage=storage))
    return MoEView(skeleton.model, tuple(layers))


def _flat(own: _Layer, parts: Parts) -> dict[str, Tensor]:
    """Return all parts of a layer under names of their own."""
    return {
        f"{attribute}.{part}": tensor
        for attribute, experts in own.items()
        for part, tensor in parts[experts.name].items()
    }


def _whole(
    own: _Layer, flat: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor | SlicedTensor]:
    """Return a layer's parameters from its parts; those of fewer bits as what reads them back."""
    found: dict[str, Tensor | SlicedTensor] = {}
    for attribute, experts in own.items():
        prefix = f"{attribute}."
        parts = {n.removeprefix(prefix): t for n, t in flat.items() if n.startswith(prefix)}
        whole = parts.get("")
        found[attribute] = decoded(parts, experts, dtypes[experts.name]) if whole is None else whole
    return found


def _turn(
    turns: LayersInTurn, index: int, own: _Layer, dtypes: Mapping[str, torch.dtype]
) -> OnDevice:
    @contextmanager
    def opened() -> Iterator[Mapping[str, Tensor | SlicedTensor]]:
        with turns.opened(index) as flat:
            yield _whole(own, flat, dtypes)

    return opened
