"""What a model needs to be trained, from its configuration alone: no weight is read.

The model is built on the meta device, where tensors have shapes and no values. A forward pass of
it, in which every expert gets the same number of tokens, tells what autograd would keep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from orchard.library_errors import first_line
from orchard.models.kernels.pairs import is_pair
from orchard.models.stored.loading import DTYPES
from orchard.models.trainable.factored import is_factored
from orchard.models.trainable.slots import full_slots, lora_slots
from orchard.models.trainable.targets import LoraSettings, find_targets, inject_lora
from orchard.models.view.detection import view_config
from orchard.models.view.moe import MoELayer, MoEView


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model and of what is trained of it.

    Attributes:
        layers: Name of each MoE layer, in forward order, to its number of experts.
        dense_bytes: Weights and buffers that are no routed expert, in the base's dtype.
        expert_bytes: Weights of one routed expert, by layer, in the base's dtype.
        trainable: Name to elements, of everything that can be trained, as in ``AdaptedModel``.
        vocabulary: Rows of the output.
        is_factored: Whether adapters of experts run as products of their own, in every layer.
    """

    layers: dict[str, int]
    dense_bytes: int
    expert_bytes: dict[str, int]
    trainable: dict[str, int]
    vocabulary: int
    is_factored: bool = False

    @property
    def num_experts(self) -> int:
        """Routed experts of all layers."""
        return sum(self.layers.values())


def measure_footprint(config: Any, lora: LoraSettings, *, dtype: str) -> Footprint:
    """Return the sizes of the model that a transformers config describes.

    Raises:
        ValueError: A target fits nothing.
    """
    view = view_config(config)
    experts = {id(p) for layer in view.layers for p in layer.storage.parameters()}
    bytes_of = DTYPES[dtype].itemsize
    dense = sum(p.numel() for p in view.model.parameters() if id(p) not in experts)
    expert_bytes = {
        layer.name: bytes_of
        * sum(p.numel() for p in layer.storage.parameters())
        // layer.num_experts
        for layer in view.layers
    }
    return Footprint(
        layers={layer.name: layer.num_experts for layer in view.layers},
        dense_bytes=bytes_of * dense,
        expert_bytes=expert_bytes,
        trainable=_trainable(view, lora),
        vocabulary=int(config.get_text_config().vocab_size),
        is_factored=all(is_factored(layer.storage) for layer in view.layers),
    )


def _trainable(view: MoEView, lora: LoraSettings) -> dict[str, int]:
    modules, parameters = find_targets(view, lora.targets)
    full = dict(full_slots(view, lora.full, adapted=(*modules, *parameters)))
    if modules or parameters:
        inject_lora(
            view.model,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=0.0,
            modules=modules,
            parameters=parameters or None,
        )
    slots = {**dict(lora_slots(view.model, view)), **full}
    return {name: slot.view(slot.parameter).numel() for name, slot in slots.items()}


def activation_bytes(
    config: Any,
    lora: LoraSettings,
    kept: Sequence[int],
    *,
    dtype: str,
    batch_size: int,
    num_tokens: int,
) -> int:
    """Return what autograd keeps of one forward pass, without parameters.

    Args:
        config: A transformers config.
        lora: What is trained.
        kept: Experts in each MoE layer that tokens are divided among.
        dtype: Of the base.
        batch_size: Examples.
        num_tokens: Tokens of each.

    Raises:
        ValueError: The family's forward pass needs values, so it cannot be measured without them.
    """
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    view = view_config(config)
    model = view.model.to(DTYPES[dtype]).train()
    model.requires_grad_(False)
    modules, parameters = find_targets(view, lora.targets)
    full = dict(full_slots(view, lora.full, adapted=(*modules, *parameters)))
    for layer, number in zip(view.layers, kept, strict=True):
        layer.experts.forward = _balanced(layer, number)
    # Adapters on experts fold into their weights; what that costs is counted with the weights.
    if modules:
        inject_lora(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, modules=modules)
    for slot in full.values():
        slot.parameter.requires_grad_(True)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    seen: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return tensor

    # Something early must carry a gradient, as adapters on experts and attention do.
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda *call: call[2].requires_grad_())
    # Where values decide how many entries are taken, the most are: all.
    every = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
    try:
        with every, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**_places(model, batch_size, num_tokens), use_cache=False)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"memory must be computable without values, got {type(model).__name__}, whose forward "
            f"pass needs them ({first_line(error)}); measure it on the model itself"
        ) from error
    finally:
        handle.remove()
    return sum(int(storage.nbytes()) for storage in seen.values())


def _places(model: nn.Module, batch_size: int, num_tokens: int) -> dict[str, Tensor]:
    """Return what a model is called with, without values; of a pair, half of it for each."""
    is_apart = is_pair(model)
    num_read = -(-num_tokens // 2) if is_apart else num_tokens
    places = torch.zeros(batch_size, num_read, dtype=torch.long, device="meta")
    mask = torch.ones(batch_size, 1, num_read, num_read, dtype=torch.bool, device="meta")
    if is_apart:
        # An encoder without a mask reads all; one of two dimensions would be asked for its values.
        return {
            "input_ids": places,
            "decoder_input_ids": places,
            "decoder_attention_mask": mask,
        }
    return {"input_ids": places, "attention_mask": mask, "position_ids": places}


def _balanced(layer: MoELayer, num_kept: int) -> Callable[..., Tensor]:
    """Return a forward of fused experts in which each kept one gets the same number of tokens."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        num_pairs = hidden_states.shape[0] * min(top_k_index.shape[1], num_kept)
        y_TD = torch.zeros_like(hidden_states)
        for _ in range(num_kept):
            share = -(-num_pairs // num_kept)
            token = torch.zeros(share, dtype=torch.long, device="meta")
            output = layer.run_expert(0, hidden_states[token]) * top_k_weights[token, :1]
            y_TD = y_TD.index_add(0, token, output.to(y_TD.dtype))
        return y_TD

    return forward
