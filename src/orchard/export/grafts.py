"""A client's grafts as plain tensors: experts with their adapters merged, gates and mixers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from orchard.experiment.settings import graft_settings
from orchard.export.checking import ReadSlice
from orchard.models.stored.conversion import StoredModel, find_path
from orchard.models.view.moe import MoELayer, check_beside
from orchard.models.view.storage import FusedExperts
from orchard.personal.state import ModelState

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def merged_grafts(
    state: ModelState,
    stored: StoredModel,
    *,
    dtype: torch.dtype | None,
    read: ReadSlice | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return grafts under the names of the modeling file, and what its configuration says of them.

    Args:
        state: A client's, with grafts.
        stored: The base.
        dtype: Of experts; None = as the base stores them. Gates and mixers are float32.
        read: See ``Merger``.

    Raises:
        ValueError: A tensor of a graft has no place in it.
    """
    settings = graft_settings(state.recipe)
    if state.graft_experts:
        check_beside(stored.whole.layers, doing="exported")
    tensors: dict[str, Tensor] = {}
    blocks, used = [], set()
    for layer in stored.whole.layers if state.graft_experts else ():
        experts = state.graft_experts[layer.name]
        prefix = f"{layer.name}.graft."
        own = {n.removeprefix(prefix): t for n, t in state.own.items() if n.startswith(prefix)}
        used |= {prefix + name for name in own}
        to = f"{layer.path}.graft."
        hidden, has_bias = 0, False
        for index, expert in enumerate(experts):
            inner = f"{index}." if len(experts) > 1 else ""
            projections = _expert(stored, layer, expert, read)
            hidden = projections["up_proj"].shape[0]
            for local in PROJECTIONS:
                if local not in projections:
                    continue
                weight = projections[local].float()
                bias = projections.get(f"{local}_bias")
                if settings.mix == "difference":
                    as_begun = f"{to}begun.{index}.{local}"
                    tensors[f"{as_begun}.weight"] = (
                        projections[local].to(dtype or projections[local].dtype).contiguous()
                    )
                    if bias is not None:
                        tensors[f"{as_begun}.bias"] = bias.to(dtype or bias.dtype).contiguous()
                if settings.kind == "dense":
                    weight = own.pop(f"{inner}{local}.weight").float()
                else:
                    a, b = own.pop(f"{inner}{local}.lora_A"), own.pop(f"{inner}{local}.lora_B")
                    weight = weight + settings.alpha / settings.rank * (b.float() @ a.float())
                kept = dtype or projections[local].dtype
                tensors[f"{to}members.{index}.{local}.weight"] = weight.to(kept).contiguous()
                if bias is not None:
                    has_bias = True
                    bias = own.pop(f"{inner}{local}.bias", bias)
                    tensors[f"{to}members.{index}.{local}.bias"] = bias.to(kept).contiguous()
        for ours, theirs in (("gate", "opening"), ("router", "mixer")):
            for local in ("weight", "bias"):
                if (value := own.pop(f"{ours}.{local}", None)) is not None:
                    value = value.float().contiguous()
                    shaped = value[None] if ours == "gate" and local == "weight" else value
                    tensors[f"{to}{theirs}.{local}"] = shaped
        if own:
            raise ValueError(
                f"every tensor of a graft must have a place in the export, got none for "
                f"{prefix}{next(iter(own))}; open the run with the version that trained it"
            )
        blocks.append(
            {
                "path": layer.path,
                "experts": find_path(layer).rpartition(".")[2],
                "count": len(experts),
                "width": layer.width,
                "hidden": hidden,
                "bias": has_bias,
                "mixer_bias": f"{to}mixer.bias" in tensors,
            }
        )
    return tensors, {"gate": settings.gate, "mix": settings.mix, "blocks": blocks}


def _expert(
    stored: StoredModel, layer: MoELayer, expert: int, read: ReadSlice | None
) -> Mapping[str, Tensor]:
    """Return an expert as it is in the base."""
    parameters = stored.parameters(layer)
    storage = cast(FusedExperts, layer.storage)
    if read is not None:
        return storage.split(lambda name: read(layer.name, name, expert))
    return storage.split(lambda name: parameters[name].read(stored.checkpoint, expert))
