"""Models whose experts do not all fit into memory.

A *submodel* holds the dense part and, of each MoE layer, only some experts; it trains like any
model. A *skeleton* holds the dense part and whole routers, and no expert; it runs forward while
experts are read one at a time. Both come from a safetensors checkpoint, and loading either needs
the memory of the result and about one tensor more, however large the checkpoint is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from orchard.library_errors import first_line
from orchard.models.stored.carving import (
    carve_layer,
    check_carvable,
    check_kept,
    select_rows,
    with_other_rows,
)
from orchard.models.stored.completeness import check_loaded
from orchard.models.stored.conversion import StoredExperts, StoredModel, match_checkpoint
from orchard.models.stored.finiteness import check_finite
from orchard.models.stored.loading import DTYPES
from orchard.models.stored.sources import without_reports
from orchard.models.stored.tensors import Checkpoint, LazyTensor
from orchard.models.view.detection import view_config, view_moe
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.routers import find_rows
from orchard.models.view.storage import FusedExperts
from orchard.process_memory import release_freed_memory


def load_submodel(
    path: str | StoredModel, kept: Sequence[Sequence[int]], *, dtype: str, device: str = "cpu"
) -> MoEView:
    """Load the dense part of a model and, of each MoE layer, the kept experts only.

    Routing is among the kept experts: the family's own router with their rows, so the softmax is
    over their logits, and a token chooses ``min(K, kept)`` of them. The rest is what
    ``from_pretrained`` loads. The model is frozen and in eval mode, its experts run eagerly, and
    names carry the checkpoint's ids: ``layers.3.experts.17.down_proj`` is one name everywhere.

    Args:
        path: Folder, hub name, or ``orchard:tiny``; or what ``match_checkpoint`` found there.
        kept: For each MoE layer, in forward order, the ids of its experts, ascending.
        dtype: ``float32`` or ``bfloat16``.
        device: Where to put the model.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: ``kept`` does not fit the model; or its experts cannot be read one by one; or
            its routers mean something else with fewer experts. No weight is read before.
    """
    stored = match_checkpoint(path)
    check_kept(stored.whole, kept)
    check_carvable(view_config(stored.whole.model.config), kept)
    model, layers = _load_dense(stored, kept, dtype=dtype, device=device)
    for layer in layers:
        for attribute, experts in stored.parameters(layer).items():
            values = _read_experts(model, stored.checkpoint, experts, layer.expert_ids, dtype)
            parameter = nn.Parameter(values.to(device), requires_grad=False)
            setattr(layer.experts, attribute, parameter)
    release_freed_memory()
    return _view(model, layers)


def load_skeleton(path: str | StoredModel, *, dtype: str, device: str = "cpu") -> MoEView:
    """Load the dense part of a model with whole routers; its experts stay on ``meta``.

    It runs inside ``streamed_experts``. Tensors of experts have shapes and no values, so a view
    cannot read or write them, and the model can move to no other device.

    Args:
        path: Folder, hub name, or ``orchard:tiny``; or what ``match_checkpoint`` found there.
        dtype: ``float32`` or ``bfloat16``.
        device: Where to put the dense part.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: Its experts cannot be read one by one. No weight is read before.
    """
    stored = match_checkpoint(path)
    model, layers = _load_dense(stored, None, dtype=dtype, device=device)
    for layer in layers:
        for attribute, experts in stored.parameters(layer).items():
            own = experts_dtype(model, experts.name, dtype)
            values = torch.empty(experts.shape, dtype=own, device="meta")
            setattr(layer.experts, attribute, nn.Parameter(values, requires_grad=False))
    return _view(model, layers)


def _view(model: nn.Module, layers: Sequence[MoELayer]) -> MoEView:
    # Storage reads its sizes from parameters, which are there now.
    filled = (replace(layer, storage=FusedExperts(layer.experts)) for layer in layers)
    return MoEView(model, tuple(filled))


def experts_dtype(model: nn.Module, name: str, dtype: str) -> torch.dtype:
    """Return the dtype of a model's parameter where ``dtype`` was asked for.

    As from_pretrained: some modules stay in float32 whatever is asked for.
    """
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    is_strict = any(re.search(pattern, name) for pattern in strict)
    return torch.float32 if is_strict else DTYPES[dtype]


def _read_experts(
    model: nn.Module,
    checkpoint: Checkpoint,
    stored: StoredExperts,
    experts: Sequence[int],
    dtype: str,
) -> Tensor:
    own = experts_dtype(model, stored.name, dtype)
    values = torch.empty((len(experts), *stored.shape[1:]), dtype=own)
    for index, expert in enumerate(experts):
        values[index] = stored.read(checkpoint, expert)
    check_finite([(stored.name, values)], path=str(checkpoint.folder))
    return values


def _load_dense(
    stored: StoredModel, kept: Sequence[Sequence[int]] | None, *, dtype: str, device: str
) -> tuple[nn.Module, tuple[MoELayer, ...]]:
    """Load all but the experts, whose parameters are None afterwards.

    transformers loads: names, conversions, ties, buffers and dtypes are its own. Its model class
    is told to shrink the model right after building it, on ``meta``, and gets lazy tensors.
    """
    model_class: Any = type(stored.whole.model)
    model_config: Any = stored.whole.model.config
    found: list[MoELayer] = []

    def build(model: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(model, *args, **kwargs)
        for index, layer in enumerate(view_moe(model).layers):
            found.append(carve_layer(layer, kept[index] if kept else layer.expert_ids))
            for name, _ in list(layer.experts.named_parameters(recurse=False)):
                setattr(layer.experts, name, None)
            # What is missing must not be initialized, which some families do from the block.
            for module in (layer.experts, layer.block):
                cast(Any, module)._is_hf_initialized = True

    about = {"__init__": build, "__module__": model_class.__module__}
    shrinking: Any = type(model_class.__name__, (model_class,), about)
    state = _state(stored, kept)
    try:
        with without_reports():
            model, loaded = shrinking.from_pretrained(
                None,
                # Of text alone where the published one has more.
                config=copy.deepcopy(model_config),
                state_dict=state,
                dtype=DTYPES[dtype],
                experts_implementation="eager",
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise ValueError(
            f"model.path must hold tensors that its model can be made of, got {stored.source} "
            f"({first_line(error)}); download it again, or choose another checkpoint"
        ) from error
    check_loaded(loaded, path=stored.source)
    check_finite(model.state_dict().items(), path=stored.source)
    model.__class__ = model_class
    model.name_or_path = model.config.name_or_path = stored.source
    _set_generation(model, stored.source)
    return model.to(device).eval().requires_grad_(False), tuple(found)


def _state(stored: StoredModel, kept: Sequence[Sequence[int]] | None) -> dict[str, LazyTensor]:
    """Return the checkpoint without experts, and of routers the rows of kept experts."""
    model, layers = stored.whole.model, stored.whole.layers
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    names |= {id(tensor): name for name, tensor in model.named_buffers()}
    rows = {}
    for layer, experts in zip(layers, kept or (), strict=kept is not None):
        if len(experts) == layer.num_experts:
            continue
        found = find_rows(layer.router, layer.block, num_experts=layer.num_experts)
        for local, (holder, name) in found.items():
            tensor = getattr(holder, name)
            kept_rows = with_other_rows(experts, tensor, local, layer.num_experts)
            rows[names[id(tensor)]] = (local, kept_rows)
    state = {}
    for key, name in stored.names.items():
        read = _reader(stored.checkpoint, key)
        if name in rows:
            if key in stored.converted:
                raise ValueError(
                    f"checkpoint must store {name} as the model has it, got {key}; "
                    "keep all experts of this layer, or choose another checkpoint"
                )
            read = _row_reader(read, *rows[name])
        state[key] = LazyTensor(read)
    return state


def _reader(checkpoint: Checkpoint, key: str) -> Callable[[], Tensor]:
    return lambda: checkpoint.read(key)


def _row_reader(
    read: Callable[[], Tensor], local: str, experts: Sequence[int]
) -> Callable[[], Tensor]:
    return lambda: select_rows(read(), local, experts)


def _set_generation(model: Any, source: str) -> None:
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
