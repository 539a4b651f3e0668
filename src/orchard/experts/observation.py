"""The routing of every forward pass, as scores and meters read it: without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orchard.experts.importance import ImportanceSettings, LayerImportance, layer_importance
from orchard.models.kernels.packing import rows_of
from orchard.models.kernels.pairs import is_pair, read_by
from orchard.models.view.moe import MoEView
from orchard.models.view.routing import is_decoder, record_routing


@dataclass(frozen=True)
class LayerPass:
    """One layer's routing of the real tokens of one or several forward passes."""

    probabilities_TE: Tensor
    """Softmax of the router."""
    choices_TK: Tensor
    """Each token's experts; E stands for none."""
    sample_T: Tensor
    """Which sample a token belongs to."""


@contextmanager
def watch_routing(
    view: MoEView, see: Callable[[tuple[LayerPass, ...]], None], *, keep_graph: bool = False
) -> Iterator[None]:
    """Call ``see`` after every forward pass of a model while the context lasts.

    Args:
        view: The model; its padding is read from the ``attention_mask`` that it is called with.
        see: Gets one ``LayerPass`` per MoE layer.
        keep_graph: Leave its probabilities in the graph of the forward pass.
    """
    of_decoder = [is_decoder(view, layer) for layer in view.layers]
    sides = (False, True) if is_pair(view.model) else (False,)
    with record_routing(view, keep_graph=keep_graph) as record:

        def before(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            if is_writing(kwargs):
                return
            _, record.token_mask_BS = read_by(kwargs, is_decoder=False)
            if is_pair(view.model):
                _, record.decoder_token_mask_BS = read_by(kwargs, is_decoder=True)
            # Somebody may have run parts of the model alone, as FLEx's choice of experts does.
            for layer in record.layers:
                layer.passes.clear()

        def after(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if is_writing(kwargs):
                for layer in record.layers:
                    layer.passes.clear()
                return
            sample_of_T = [rows_of(kwargs, is_decoder=own) for own in sides]
            passes = []
            for layer, side in zip(record.layers, of_decoder, strict=True):
                is_real_T = layer.token_mask_T
                sample_T = sample_of_T[side].to(is_real_T.device)
                passes.append(
                    LayerPass(
                        layer.probabilities_TE[is_real_T],
                        layer.choices_TK[is_real_T],
                        sample_T[is_real_T],
                    )
                )
                layer.passes.clear()
            record.token_mask_BS = record.decoder_token_mask_BS = None
            see(tuple(passes))

        handles = [
            view.model.register_forward_pre_hook(before, with_kwargs=True),
            view.model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def is_writing(arguments: Mapping[str, Any]) -> bool:
    """Say whether a call is of a decoder alone, which writes what its encoder has read before."""
    return arguments.get("input_ids") is None


def concatenate(passes: list[tuple[LayerPass, ...]]) -> tuple[LayerPass, ...]:
    """Join the passes of several batches, as if they had been one batch."""
    joined = []
    for layers in zip(*passes, strict=True):
        offsets, offset = [], 0
        for layer in layers:
            offsets.append(layer.sample_T + offset)
            offset += int(layer.sample_T.max()) + 1
        joined.append(
            LayerPass(
                torch.cat([layer.probabilities_TE for layer in layers]),
                torch.cat([layer.choices_TK for layer in layers]),
                torch.cat(offsets),
            )
        )
    return tuple(joined)


def score(layers: tuple[LayerPass, ...], settings: ImportanceSettings) -> list[LayerImportance]:
    """Return the importance of every expert in these passes, one entry per layer."""
    return [
        layer_importance(
            layer.probabilities_TE,
            settings,
            choices_TK=layer.choices_TK,
            sample_T=layer.sample_T,
        )
        for layer in layers
    ]
