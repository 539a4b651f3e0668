"""A base whose frozen experts are where a recipe says: in memory, mapped from disk, in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from orchard.models.kernels.carrying import Carrier, carrier_of, check_carried_to
from orchard.models.stored.conversion import StoredExperts, StoredModel, match_checkpoint
from orchard.models.stored.expert_parts import Parts, decoded, map_parts, read_parts
from orchard.models.stored.finiteness import check_finite
from orchard.models.stored.loading import Base, load_base
from orchard.models.stored.mapping import map_tensors
from orchard.models.stored.offloading import offload
from orchard.models.stored.submodel import experts_dtype, load_skeleton
from orchard.models.trainable.targets import ALL, EXPERTS, LoraSettings
from orchard.models.view.held import HeldExperts
from orchard.models.view.moe import MoEView
from orchard.models.view.storage import FusedExperts
from orchard.trees import SlicedTensor, digest

NO_CACHE = "none"
KINDS = ("memory", "mapped", "offload")


@dataclass(frozen=True)
class Placement:
    """Where the frozen experts of a base are.

    Attributes:
        kind: Of ``KINDS``.
        cache: With ``mapped``, the folder of the fused cache; "" = beside the checkpoint; ``none``
            = they are read where the checkpoint has them. With ``offload``, the folder of the cache
            that they are brought from; "" = they are brought from memory.
        precision: What they are kept in, of ``PRECISIONS``; ``bf16`` = the model's dtype.
    """

    kind: str = "memory"
    cache: str = ""
    precision: str = "bf16"

    @property
    def is_plain(self) -> bool:
        """Whether experts are parameters in memory, as in any model."""
        return self.kind == "memory" and self.precision == "bf16"

    @property
    def holds(self) -> bool:
        """Whether experts are read one by one, and no parameter has them."""
        return self.precision != "bf16" or self.cache == NO_CACHE or self.kind == "offload"

    @property
    def is_mapped(self) -> bool:
        """Whether experts are on disk, in the fused cache or the checkpoint."""
        return self.kind == "mapped" or (self.kind == "offload" and bool(self.cache))


def check_placement(placement: Placement, lora: LoraSettings, *, device: str) -> None:
    """Check where experts should be against what is trained and where it runs.

    Raises:
        ValueError: Experts that are trained themselves cannot be elsewhere; or the device is not
            one that they can be so placed for.
    """
    if placement.is_plain:
        return
    option, value = ("model.placement", placement.kind)
    if placement.kind == "memory":
        option, value = ("model.frozen_precision", placement.precision)
    if named := {ALL, EXPERTS} & {*lora.full}:
        raise ValueError(
            f"{option} must be {'memory' if option.endswith('placement') else 'bf16'} with "
            f"{min(named)} in model.full_targets, got {value}; what is trained itself is kept whole"
        )
    if placement.holds and EXPERTS in lora.targets:
        option, value, needed = "model.expert_cache", NO_CACHE, "a folder"
        if placement.precision != "bf16":
            option, value, needed = "model.frozen_precision", placement.precision, "bf16"
        elif placement.kind == "offload":
            option, value, needed = "model.placement", placement.kind, "memory or mapped"
        raise ValueError(
            f"{option} must be {needed} with {EXPERTS} in "
            f"model.lora_targets, got {value}; adapters are added to whole parameters"
        )
    if placement.precision != "bf16" and placement.cache == NO_CACHE:
        raise ValueError(
            f"model.expert_cache must be a folder with model.frozen_precision = "
            f"{placement.precision}, got {NO_CACHE}; a checkpoint has them in full"
        )
    if placement.kind == "offload":
        if placement.cache == NO_CACHE:
            raise ValueError(
                "model.expert_cache must be a folder or empty with model.placement = offload, got "
                f"{NO_CACHE}; experts are brought in one piece, from memory or from a fused cache"
            )
        check_carried_to(device)
    if placement.kind == "mapped" and device != "cpu":
        raise ValueError(
            f"model.device must be cpu with model.placement = mapped, got {device}; "
            "set model.placement to offload"
        )


def open_base(
    path: str,
    *,
    dtype: str,
    device: str = "cpu",
    placement: Placement | None = None,
    carrier: Carrier | None = None,
) -> Base:
    """Load a base model, frozen, in ``dtype``, with its experts where they should be.

    Its values, and its digest, do not depend on that.

    Args:
        path: Folder, hub name, or ``orchard:tiny``.
        dtype: ``float32`` or ``bfloat16``.
        device: Where to put it.
        placement: Of its experts; None = in memory.
        carrier: What brings them to the device, with ``offload``; None = that of the device.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: It is not a usable Mixture-of-Experts model; or see ``open_cache``.
    """
    placement = placement or Placement()
    if placement.is_plain:
        return load_base(path, dtype=dtype, device=device)
    stored = match_checkpoint(path)
    skeleton = load_skeleton(stored, dtype=dtype, device=device)
    dtypes = {name: experts_dtype(skeleton.model, name, dtype) for name in stored.experts}
    if placement.kind == "offload":
        carrier = carrier or carrier_of(device)
        parts = _parts(stored, dtypes, placement, carrier.hold)
        view = offload(skeleton, stored, parts, dtypes=dtypes, carrier=carrier, device=device)
        return Base(view, digest(view.state()))
    if placement.cache == NO_CACHE:
        view = _hold(skeleton, stored, _lying(stored, dtypes, device=device))
        checked = {name: _checked(name, own, path=path) for name, own in view.state().items()}
        return Base(view, digest(checked))

    def empty(shape: tuple[int, ...], own: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=own, device=device)

    parts = _parts(stored, dtypes, placement, empty)
    view = _place(skeleton, stored, parts, dtypes)
    return Base(view, digest(view.state()))


def _parts(
    stored: StoredModel,
    dtypes: Mapping[str, torch.dtype],
    placement: Placement,
    empty: Callable[[tuple[int, ...], torch.dtype], Tensor],
) -> Parts:
    precision = placement.precision
    if placement.is_mapped:
        return map_parts(stored, dtypes, precision=precision, folder=placement.cache)
    return read_parts(stored, dtypes, precision=precision, empty=empty)


def _place(
    skeleton: MoEView,
    stored: StoredModel,
    parts: Mapping[str, Mapping[str, Tensor]],
    dtypes: Mapping[str, torch.dtype],
) -> MoEView:
    """Return a skeleton with its experts: as parameters where they are kept whole."""
    if not all("" in own for own in parts.values()):
        held = {
            name: decoded(own, stored.experts[name], dtypes[name]) for name, own in parts.items()
        }
        return _hold(skeleton, stored, held)
    layers = []
    for layer in skeleton.layers:
        for attribute, experts in stored.parameters(layer).items():
            values = nn.Parameter(parts[experts.name][""], requires_grad=False)
            setattr(layer.experts, attribute, values)
        layers.append(replace(layer, storage=FusedExperts(layer.experts, refolds=True)))
    return MoEView(skeleton.model, tuple(layers))


def _hold(skeleton: MoEView, stored: StoredModel, held: Mapping[str, SlicedTensor]) -> MoEView:
    """Return a skeleton whose experts are read one by one."""
    layers = []
    for layer in skeleton.layers:
        own = {attribute: held[e.name] for attribute, e in stored.parameters(layer).items()}
        layers.append(replace(layer, storage=HeldExperts(layer.experts, own)))
    return MoEView(skeleton.model, tuple(layers))


def _lying(
    stored: StoredModel, dtypes: Mapping[str, torch.dtype], *, device: str
) -> dict[str, SlicedTensor]:
    """Return what makes each expert's slice of the checkpoint's own bytes, when it is needed."""
    keys = [key for e in stored.experts.values() for own in e.sources.values() for key in own]
    places = [stored.checkpoint.tensors[key] for key in keys]
    mapped = dict(zip(keys, map_tensors(places), strict=True))

    def reader(experts: StoredExperts) -> Callable[[int], Tensor]:
        def read(expert: int) -> Tensor:
            found = {
                pattern: mapped[own[expert]] if experts.is_listed else mapped[own[0]][expert]
                for pattern, own in experts.sources.items()
            }
            # A copy, so that it lies where a parameter's slice would: see alignment.
            return experts.convert(found).to(dtypes[experts.name], copy=True).contiguous()

        return read

    return {
        name: SlicedTensor(
            torch.Size(experts.shape), dtypes[name], torch.device(device), reader(experts)
        )
        for name, experts in stored.experts.items()
    }


def _checked(name: str, tensor: Tensor | SlicedTensor, *, path: str) -> Tensor | SlicedTensor:
    """Return a tensor whose slices are refused where they are not finite."""
    if not isinstance(tensor, SlicedTensor):
        return tensor
    read = tensor.read

    def read_checked(index: int) -> Tensor:
        values = read(index)
        check_finite([(name, values)], path=path)
        return values

    return replace(tensor, read=read_checked)
