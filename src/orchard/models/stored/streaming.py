"""Forward passes with one expert in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from orchard.models.stored.conversion import StoredModel, check_fused, match_checkpoint
from orchard.models.stored.finiteness import check_finite
from orchard.models.stored.loading import DTYPES
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.routers import find_rows
from orchard.models.view.storage import FusedExperts

ReadExpert = Callable[[int, int], Mapping[str, Tensor]]
"""From the index of a layer in its view and an expert's id to the expert's projections, named and
oriented as ``MoELayer.expert_tensors`` does."""


def checkpoint_reader(path: str | StoredModel, dtype: str) -> ReadExpert:
    """Return a function that reads one expert from a checkpoint, and nothing else of it.

    Args:
        path: Folder, hub name, or ``orchard:tiny``; or what ``match_checkpoint`` found there.
        dtype: ``float32`` or ``bfloat16``.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: Its experts cannot be read one by one.
    """
    stored = match_checkpoint(path)
    layers = stored.whole.layers
    parameters = [stored.parameters(layer) for layer in layers]

    def read_expert(layer_index: int, expert: int) -> Mapping[str, Tensor]:
        storage = cast(FusedExperts, layers[layer_index].storage)
        if not 0 <= expert < storage.num_experts:
            raise IndexError(
                f"expert must be in 0..{storage.num_experts - 1}, got {expert}; "
                f"{layers[layer_index].name} has {storage.num_experts} routed experts"
            )
        own = parameters[layer_index]

        def read(name: str) -> Tensor:
            tensor = own[name].read(stored.checkpoint, expert)
            check_finite([(own[name].name, tensor)], path=stored.source)
            return tensor.to(DTYPES[dtype])

        return storage.split(read)

    return read_expert


def router_reader(path: str | StoredModel) -> Callable[[int, int], dict[str, Tensor]]:
    """Return a function that reads one expert's row of a router, as stored.

    It takes the index of a layer in its view and an expert's id, and returns ``weight`` (D,) and,
    where the router adds one to its logits, ``bias`` ().

    Args:
        path: Folder, hub name, or ``orchard:tiny``; or what ``match_checkpoint`` found there.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        ValueError: Its experts cannot be read one by one.
    """
    stored = match_checkpoint(path)
    names = {id(tensor): name for name, tensor in stored.whole.model.named_parameters()}
    keys = {name: key for key, name in stored.names.items()}

    def read_row(layer_index: int, expert: int) -> dict[str, Tensor]:
        layer = stored.whole.layers[layer_index]
        rows = find_rows(layer.router, layer.block, num_experts=layer.num_experts)
        return {
            kind: stored.checkpoint.read(keys[names[id(getattr(holder, local))]], index=expert)
            for kind, (holder, local) in rows.items()
            if kind in ("weight", "bias")
        }

    return read_row


def expert_runner(view: MoEView, read_expert: ReadExpert) -> Callable[[int, int, Tensor], Tensor]:
    """Return a function that reads one expert, runs it on token states (T, D), and forgets it.

    It takes the index of a layer in its view, an expert's id and the states.

    Args:
        view: A skeleton.
        read_expert: Where experts come from.
    """

    def run_expert(layer_index: int, expert: int, x_TD: Tensor) -> Tensor:
        tensors = _on(x_TD, read_expert(layer_index, expert))
        return _run(view.layers[layer_index], tensors, x_TD)

    return run_expert


@contextmanager
def streamed_experts(view: MoEView, read_expert: ReadExpert) -> Iterator[None]:
    """Run a skeleton forward, without gradients, with one expert in memory at a time.

    Each token goes to the experts that the whole model chooses, since routers are whole. An expert
    is read once per forward pass and layer if a token chose it, and freed after its tokens.

    Args:
        view: A skeleton, or a whole model whose experts are to be read elsewhere.
        read_expert: Where experts come from, ``checkpoint_reader`` or what overrides it.

    Raises:
        ValueError: Experts are not fused parameters; or, in the forward pass, one comes in
            another dtype than the model's.
    """
    check_fused(view)
    modules: list[Any] = [layer.experts for layer in view.layers]
    try:
        for index, layer in enumerate(view.layers):
            # The module is still called, so hooks on it see what they always see.
            modules[index].forward = _stream(layer, index, read_expert)
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _stream(layer: MoELayer, index: int, read_expert: ReadExpert) -> Callable[..., Tensor]:
    num_experts = layer.num_experts

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        choices_TK = top_k_index.reshape(len(x_TD), -1)
        weights_TK = top_k_weights.reshape(len(x_TD), -1)
        y_TD = torch.zeros_like(x_TD)
        for expert in sorted(set(choices_TK.flatten().tolist())):
            # E stands for none.
            if expert == num_experts:
                continue
            token, position = torch.where(choices_TK == expert)
            tensors = _on(x_TD, read_expert(index, layer.expert_ids[expert]))
            output = _run(layer, tensors, x_TD[token]) * weights_TK[token, position, None]
            y_TD.index_add_(0, token, output.to(y_TD.dtype))
            del tensors
        return y_TD.view_as(hidden_states)

    return forward


def _on(x_TD: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype != x_TD.dtype:
            raise ValueError(
                f"read_expert must return tensors of {x_TD.dtype}, got {tensor.dtype} for {name}; "
                "give it the dtype of the model"
            )
    return {name: tensor.to(x_TD.device) for name, tensor in tensors.items()}


def _run(layer: MoELayer, tensors: Mapping[str, Tensor], x_TD: Tensor) -> Tensor:
    def project(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, tensors[name], tensors.get(f"{name}_bias"))

    gate_TF = project("gate_proj", x_TD) if "gate_proj" in tensors else None
    hidden_TF = layer.activate(gate_TF, project("up_proj", x_TD))
    return layer.finish_expert(project("down_proj", hidden_TF))
