"""What routers decided, observed with hooks.

A router's output is read by its form: ``(logits, weights, choices)`` in any order, a one-hot
dispatch mask instead of choices (Switch Transformers), or logits alone (a plain linear layer).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchard.models.storage import is_fused, is_listed

if TYPE_CHECKING:
    from orchard.models.moe import MoELayer, MoEView

# What modules call K.
TOP_K_NAMES = ("top_k", "num_experts_per_tok", "topk", "moe_topk")


@dataclass(frozen=True)
class Routing:
    """The decisions of one router for T tokens, attached to the graph of the forward pass."""

    logits_TE: Tensor | None
    """Scores before softmax or sigmoid; None where the router keeps them to itself."""
    choices_TK: Tensor
    """Chosen experts; E stands for none (a token beyond an expert's capacity)."""
    weights_TK: Tensor
    """What multiplies the output of each chosen expert."""


def read_router_output(output: object, *, num_experts: int, block: nn.Module) -> Routing:
    """Read choices and weights from what a router returned.

    Args:
        output: The router's return value; leading dimensions are flattened to T.
        num_experts: E.
        block: The router's block; a router that returns logits alone leaves the choice to its
            block, whose ``top_k`` and ``norm_topk_prob`` then say how (softmax, top-k, and
            normalized or not).

    Raises:
        ValueError: The output has none of the known forms.
    """
    if isinstance(output, Tensor):
        return _choose(output.reshape(-1, num_experts), block)
    parts = [p for p in output if isinstance(p, Tensor)] if isinstance(output, tuple | list) else []
    integers = [p for p in parts if not p.is_floating_point() and p.ndim > 1]
    reals = [p for p in parts if p.is_floating_point() and p.ndim > 1]
    logits = next((p for p in reals if p.shape[-1] == num_experts), None)
    logits_TE = None if logits is None else logits.reshape(-1, num_experts)
    others = [p for p in reals if p is not logits]
    if len(integers) == 1:
        chosen = integers[0].reshape(-1, integers[0].shape[-1])
        same = [p for p in others if p.shape == integers[0].shape]
        if same:
            return Routing(logits_TE, chosen, same[0].reshape(chosen.shape))
        single = [p for p in others if p.shape == (*integers[0].shape[:-1], 1)]
        if chosen.shape[-1] == num_experts and single:
            is_kept_T1 = chosen.bool().any(dim=-1, keepdim=True)
            choices_T1 = chosen.argmax(dim=-1, keepdim=True)
            weights_T1 = single[0].reshape(-1, 1)
            return Routing(
                logits_TE,
                torch.where(is_kept_T1, choices_T1, num_experts),
                torch.where(is_kept_T1, weights_T1, torch.zeros_like(weights_T1)),
            )
    shapes = [tuple(p.shape) for p in parts]
    raise ValueError(
        f"router output must hold weights and choices of one shape, got {shapes}; "
        "choose a model whose router returns them"
    )


def _choose(logits_TE: Tensor, block: nn.Module) -> Routing:
    top_k = find_top_k(block)
    is_normalized = getattr(block, "norm_topk_prob", None)
    if top_k is None or is_normalized is None:
        raise ValueError(
            f"a block whose router returns logits alone must have top_k and norm_topk_prob, "
            f"got {type(block).__name__}; choose a model whose router returns weights and choices"
        )
    probabilities_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
    weights_TK, choices_TK = probabilities_TE.topk(top_k, dim=-1)
    if is_normalized:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(logits_TE, choices_TK, weights_TK.to(logits_TE.dtype))


def find_top_k(module: nn.Module) -> int | None:
    """Return the experts per token that ``module`` states, or None."""
    for name in TOP_K_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def read_router(router: nn.Module, block: nn.Module, *, num_experts: int) -> dict[str, Tensor]:
    """Return a router's tensors with one row per expert; see ``MoELayer.router_tensors``."""
    tensors = {}
    for local, (holder, name) in find_rows(router, block, num_experts=num_experts).items():
        tensor = cast(Tensor, getattr(holder, name))
        tensors[local] = tensor if local == "weight" else tensor.view(num_experts)
    return tensors


def find_rows(
    router: nn.Module, block: nn.Module, *, num_experts: int
) -> dict[str, tuple[nn.Module, str]]:
    """Find where a router keeps what it has one row per expert of.

    Returns:
        ``weight`` and, where there are, ``bias`` and ``correction_bias``: the module that holds
        the tensor, and the attribute.
    """
    holder = find_router_weight(router, num_experts)
    assert holder is not None
    found = {"weight": (holder, "weight")}
    bias = getattr(holder, "bias", None)
    if isinstance(bias, Tensor) and bias.shape == (num_experts,):
        found["bias"] = (holder, "bias")
    # Some blocks keep the correction themselves and pass it to their router (AFMoE).
    for module in (*router.modules(), block):
        named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in named:
            is_row = tensor.numel() == num_experts and tensor.shape[-1] == num_experts
            if is_row and "bias" in name and tensor is not bias:
                found["correction_bias"] = (module, name)
                return found
    return found


def find_router(siblings: dict[str, nn.Module], num_experts: int) -> nn.Module | None:
    """Return the sibling of the experts that scores them, or None.

    What is called gate or router comes first, then any module that has a weight with one row per
    expert and is not itself a block of experts.
    """
    named = [siblings[name] for name in ("gate", "router") if name in siblings]
    for child in (*named, *siblings.values()):
        is_block = any(is_fused(m) or is_listed(m) for m in child.modules())
        if not is_block and find_router_weight(child, num_experts) is not None:
            return child
    return None


def find_router_weight(router: nn.Module, num_experts: int) -> nn.Module | None:
    """Return the module in ``router`` whose weight has one row per expert."""
    for module in router.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == num_experts:
            return module
    return None


def probe_top_k(router: nn.Module, block: nn.Module, num_experts: int) -> int:
    """Route one token of zeros through a copy of a router that states no number (Switch)."""
    holder = find_router_weight(router, num_experts)
    assert holder is not None
    weight = cast(Tensor, holder.weight)
    with torch.no_grad():
        output = copy.deepcopy(router).eval()(weight.new_zeros(1, 1, weight.shape[1]))
    routing = read_router_output(output, num_experts=num_experts, block=block)
    return routing.choices_TK.shape[-1]


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
            handles += observer.attach(is_decoder=_is_decoder(view, layer))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _is_decoder(view: MoEView, layer: MoELayer) -> bool:
    config = getattr(view.model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and "decoder" in layer.path.split(".")


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
            self.logits_TE = find_logits(parts, self.layer.num_experts)
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
