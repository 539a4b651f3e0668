"""What routers decided, observed with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchard.models.kernels.pairs import is_pair
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.routers import read_router_output


@dataclass
class LayerRouting:
    """What one router decided for all tokens it saw, in the order it saw them."""

    num_experts: int
    """E."""
    passes: list[tuple[Tensor | None, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """One ``(probabilities_TE, choices_TK, weights_TK, token_mask_T)`` per forward pass."""

    @property
    def probabilities_TE(self) -> Tensor:
        """Softmax over the router's logits, float32; rows sum to 1.

        This holds for every family. A router that scores with a sigmoid (DeepSeek-V3) or adds a
        correction to choose is still read as the softmax of its raw logits: one rule makes layers
        and families comparable, and it keeps the order of the raw scores.

        Raises:
            ValueError: Probabilities were not kept, or nothing was recorded.
        """
        kept = [probabilities for probabilities, *_ in self.passes if probabilities is not None]
        if not kept:
            raise ValueError(
                "routing record must hold probabilities, got none; "
                "run the model inside record_routing(keep_probabilities=True)"
            )
        return torch.cat(kept)

    @property
    def choices_TK(self) -> Tensor:
        """Chosen experts, int64; E stands for none (beyond capacity).

        Raises:
            ValueError: Nothing was recorded.
        """
        return torch.cat([choices_TK for _, choices_TK, _, _ in self._seen()])

    @property
    def weights_TK(self) -> Tensor:
        """What multiplied the output of each chosen expert.

        Raises:
            ValueError: Nothing was recorded.
        """
        return torch.cat([weights_TK for _, _, weights_TK, _ in self._seen()])

    @property
    def token_mask_T(self) -> Tensor:
        """True for a real token, False for padding.

        Raises:
            ValueError: Nothing was recorded.
        """
        return torch.cat([mask_T for _, _, _, mask_T in self._seen()])

    def expert_counts(self) -> Tensor:
        """Return how many real tokens chose each expert, (E,) int64."""
        chosen = self.choices_TK[self.token_mask_T].flatten()
        return torch.bincount(chosen, minlength=self.num_experts + 1)[: self.num_experts]

    def _seen(self) -> list[tuple[Tensor | None, Tensor, Tensor, Tensor]]:
        if not self.passes:
            raise ValueError(
                "routing record must hold a forward pass, got none; "
                "run the model inside record_routing"
            )
        return self.passes


@dataclass
class RoutingRecord:
    """Routing of all MoE layers; forward passes append to it while recording is on."""

    layers: tuple[LayerRouting, ...]
    """One entry per layer of the view, in its order."""
    token_mask_BS: Tensor | None = None
    """Mask of the next forward pass; assign a new one before each batch. None masks nothing."""
    decoder_token_mask_BS: Tensor | None = None
    """The same for the decoder layers of an encoder-decoder model."""

    def expert_counts(self, layer_index: int) -> Tensor:
        """Return how many real tokens chose each expert of a layer, (E,) int64."""
        return self.layers[layer_index].expert_counts()


@contextmanager
def record_routing(
    view: MoEView,
    *,
    token_mask_BS: Tensor | None = None,
    decoder_token_mask_BS: Tensor | None = None,
    keep_probabilities: bool = True,
    keep_graph: bool = False,
) -> Iterator[RoutingRecord]:
    """Record what every router of a model decides inside the ``with`` block.

    Hooks observe and never change a value; they are removed on exit, also after an exception.
    The second forward of gradient checkpointing, inside backward, is
    not recorded again.

    Args:
        view: The model's view.
        token_mask_BS: Nonzero for real tokens, as a tokenizer's ``attention_mask``; None for no
            padding. For several batches assign ``record.token_mask_BS`` before each.
        decoder_token_mask_BS: The mask for the decoder layers of an encoder-decoder model, where
            ``token_mask_BS`` serves the encoder.
        keep_probabilities: Keep ``probabilities_TE``, the largest part of the record.
        keep_graph: Keep them in the graph of the forward pass; all else is detached in any case.

    Yields:
        The record, filled by each forward pass.

    Raises:
        ValueError: In the forward pass, a mask that does not cover the tokens of the batch.
    """
    record = RoutingRecord(
        layers=tuple(LayerRouting(layer.num_experts) for layer in view.layers),
        token_mask_BS=token_mask_BS,
        decoder_token_mask_BS=decoder_token_mask_BS,
    )
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for index, layer in enumerate(view.layers):
            observer = _Observer(layer, record, index, keep_probabilities, keep_graph)
            handles += observer.attach(is_decoder=is_decoder(view, layer))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def is_decoder(view: MoEView, layer: MoELayer) -> bool:
    """Say whether a layer of an encoder-decoder model is of the decoder."""
    return is_pair(view.model) and "decoder" in layer.path.split(".")


class _Observer:
    """Hooks of one layer: the router gives logits, the call of fused experts gives the rest."""

    def __init__(
        self,
        layer: MoELayer,
        record: RoutingRecord,
        index: int,
        keep_probabilities: bool,
        keep_graph: bool,
    ) -> None:
        self.layer = layer
        self.record = record
        self.entries = record.layers[index].passes
        self.keep_probabilities = keep_probabilities
        self.keep_graph = keep_graph
        self.is_decoder = False
        self.num_rows = layer.num_rows
        self.logits_TE: Tensor | None = None

    def attach(self, *, is_decoder: bool) -> list[torch.utils.hooks.RemovableHandle]:
        self.is_decoder = is_decoder
        router = self.layer.router.register_forward_hook(self.see_router, with_kwargs=True)
        if not self.layer.is_fused:
            return [router]
        experts = self.layer.experts.register_forward_pre_hook(self.see_experts, with_kwargs=True)
        return [router, experts]

    def see_router(
        self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if _in_backward():
            return
        if self.layer.is_fused:
            parts = output if isinstance(output, tuple | list) else (output,)
            logits = find_logits(parts, self.layer.num_experts)
            if logits is None and self.num_rows > self.layer.num_experts:
                logits = find_logits(parts, self.num_rows)
            if logits is None and self.keep_probabilities:
                with torch.set_grad_enabled(self.keep_graph and torch.is_grad_enabled()):
                    logits = self.layer.score((*args, *kwargs.values())[0])
            self.logits_TE = None if logits is None else logits[:, : self.layer.num_experts]
            return
        routing = read_router_output(
            output, num_experts=self.layer.num_experts, block=self.layer.block
        )
        logits_TE = routing.logits_TE
        if logits_TE is None and self.keep_probabilities:
            # Such a router (DeepSeek-MoE-16B) computes exactly this product and keeps it.
            (x, *_) = (*args, *kwargs.values())
            tensors = self.layer.router_tensors()
            with torch.set_grad_enabled(self.keep_graph and torch.is_grad_enabled()):
                logits_TE = functional.linear(
                    x.reshape(-1, x.shape[-1]), tensors["weight"], tensors.get("bias")
                )
        self.append(logits_TE, routing.choices_TK, routing.weights_TK)

    def see_experts(
        self, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if _in_backward():
            return
        _, choices_TK, weights_TK = (*args, *kwargs.values())[:3]
        self.append(self.logits_TE, choices_TK, weights_TK)
        self.logits_TE = None

    def append(self, logits_TE: Tensor | None, choices_TK: Tensor, weights_TK: Tensor) -> None:
        probabilities_TE = None
        if self.keep_probabilities and logits_TE is not None:
            probabilities_TE = _to_probabilities(
                logits_TE if self.keep_graph else logits_TE.detach()
            )
        # Copies: a block may go on to change its routing in place.
        choices_TK = choices_TK.detach().clone()
        weights_TK = weights_TK.detach().clone()
        if self.num_rows > self.layer.num_experts:
            # A token that skips the experts (Zaya) is given to the first of them with weight 0.
            choices_TK[weights_TK == 0] = self.layer.num_experts
        self.entries.append((probabilities_TE, choices_TK, weights_TK, self.mask(choices_TK)))

    def mask(self, choices_TK: Tensor) -> Tensor:
        name = "decoder_token_mask_BS" if self.is_decoder else "token_mask_BS"
        mask_BS: Tensor | None = getattr(self.record, name)
        num_tokens = choices_TK.shape[0]
        if mask_BS is None:
            return torch.ones(num_tokens, dtype=torch.bool, device=choices_TK.device)
        if mask_BS.numel() != num_tokens:
            raise ValueError(
                f"{name} must cover the {num_tokens} tokens of the forward pass, "
                f"got shape {tuple(mask_BS.shape)}; assign the mask of this batch to the record"
            )
        return mask_BS.reshape(-1).to(choices_TK.device, torch.bool, copy=True)


def find_logits(parts: tuple[Any, ...] | list[Any], num_experts: int) -> Tensor | None:
    """Return the first real tensor whose last dimension is E, flattened to (T, E), or None."""
    for part in parts:
        if not isinstance(part, Tensor) or not part.is_floating_point() or part.ndim < 2:
            continue
        if part.shape[-1] == num_experts:
            return part.reshape(-1, num_experts)
    return None


def _to_probabilities(logits_TE: Tensor) -> Tensor:
    # A few routers (Gemma 4) return probabilities in the place of logits: rows of nonnegative
    # numbers that sum to 1, which logits never are.
    values_TE = logits_TE.float()
    sums_T = values_TE.sum(dim=-1)
    if bool((values_TE >= 0).all()) and torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-3):
        return values_TE.clone()
    return values_TE.softmax(dim=-1)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
