"""Settings of grafts, and what tests look at while grafts are attached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from orchard.experts.grafting import Grafts, GraftSettings
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.view.moe import MoELayer
from tiny_models import WIDTH, batch_of

SOME = [
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "deepseek_moe_16b",
    "aria",
    "nemotron_h",
]
KINDS = ["lora", "dense"]
LORA = GraftSettings(rank=2, alpha=4.0, dropout=0.0)
NO_GATE = replace(LORA, gate="none")
CLOSED = replace(LORA, gate="closed")
CHOICE = (3, 5)


@torch.no_grad()
def logits_of(model: AdaptedModel) -> Tensor:
    return model.model(**batch_of(model.model)).logits


def stir_grafts(model: AdaptedModel, grafts: Grafts, *, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(8)
    values = model.read(grafts.names)
    model.load({n: t + size * torch.randn(t.shape, generator=generator) for n, t in values.items()})


@contextmanager
def watch(model: AdaptedModel) -> Iterator[list[tuple[MoELayer, Tensor, Any]]]:
    """Collect what each block reads and returns, grafts included."""
    seen: list[tuple[MoELayer, Tensor, Any]] = []
    handles = []
    for layer in model.view.layers:

        def see(
            block: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
            layer: MoELayer = layer,
        ) -> None:
            seen.append((layer, args[0] if args else kwargs["hidden_states"], output))

        handles.append(layer.block.register_forward_hook(see, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def plain(layer: MoELayer, x_BSD: Tensor) -> Any:
    """Run a block without its hooks, and so without its graft."""
    return layer.block.forward(x_BSD)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def alone(layer: MoELayer, expert: int, x_BSD: Tensor) -> Tensor:
    return layer.run_expert(expert, x_BSD.reshape(-1, WIDTH)).view_as(x_BSD)
