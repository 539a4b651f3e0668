"""The gradient of each row of one packed pass, of everything that linear products train.

A row's gradient in the weight of a product is the product of what the row's tokens gave back and
what they read. Both are kept in the backward pass, whose own gradient of the weight, a sum over all
rows, is left out; then one batched product of padded rows gives the gradients of all rows. A weight
that was made of what is trained, such as a router with its adapter or a gate's row, hands each
row's gradient on to that. Routed experts read some tokens of each row: their adapters get a batched
product for every pair of row and expert, and a weight's own gradient is never made for a row, only
that of the two factors, R * (in + out) values in the place of in * out.

Source: Goodfellow, 2015, arXiv:1510.01799 (gradients of rows from what linear layers read and give
back). Adapters of fused experts, whose tokens are mixed over rows, are ours. Opacus' hooks find
rows in the first dimension of what a module reads; packed rows stand behind each other in one, and
experts in one parameter are no module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.factored import Factors, find_wrappers
from orchard.models.trainable.segments import group_segments
from orchard.models.view.moe import MoEView
from orchard.models.view.storage import FusedExperts, Product

_SUMS = frozenset((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__))


class UncoveredError(Exception):
    """A pass trained something otherwise than by a product whose rows are known."""


@dataclass
class _Use:
    """One product of a pass, with a weight or as what is added to its result.

    Attributes:
        weight: What was multiplied with, or added: trained itself, or made of what is trained.
        given_TN: The gradient in what came out, once it was seen.
        read_TM: What was multiplied; None for what was added.
    """

    weight: Tensor
    given_TN: Tensor
    read_TM: Tensor | None


@dataclass
class _RoutedUse:
    """One product of an expert's tokens.

    Attributes:
        expert: Which, counted in its layer.
        token_P: The tokens that it read.
        given_PN: The gradient in what came out.
        read_PM: What was multiplied.
    """

    expert: int
    token_P: Tensor
    given_PN: Tensor
    read_PM: Tensor


class RowGradients:
    """The gradients of each row of a pass, in everything that is trained."""

    def __init__(self, model: AdaptedModel, names: Collection[str]) -> None:
        """Find the adapters of fused experts.

        Args:
            model: A model for which ``why_row_by_row`` says nothing.
            names: What is trained, with gradients switched on.
        """
        self._model = model
        self._trained = {id(p): p for p in model.whole_parameters(names)}
        by_parameter = {
            id(wrapper.get_param()): factors
            for wrapper, factors in find_wrappers(model.model)
            if {id(factors.A), id(factors.B)} & {*self._trained}
        }
        self._experts: list[tuple[FusedExperts, Mapping[str, Factors]]] = []
        for layer in model.view.layers:
            if isinstance(layer.storage, FusedExperts):
                parameters = layer.experts.named_parameters(recurse=False)
                own = {n: by_parameter[id(p)] for n, p in parameters if id(p) in by_parameter}
                if own:
                    self._experts.append((layer.storage, own))

    @contextmanager
    def watched(self, lengths: tuple[int, ...]) -> Iterator[_Watch]:
        """Keep what is needed of one pass over packed rows, forward and backward, inside.

        The backward pass gives what is trained no gradients; ``take`` then has them by rows.

        Args:
            lengths: Tokens of each row.
        """
        watch = _Watch(self._trained, self._experts, lengths)
        with ExitStack() as undo:
            for storage, own in self._experts:
                storage.routed_product = partial(watch.routed, own)
                undo.callback(setattr, storage, "routed_product", None)
            undo.enter_context(watch)
            yield watch


class _Watch(TorchFunctionMode):
    """What the products of a pass read and gave back, until ``take`` makes gradients of it.

    The graph of the pass holds this object, by what its nodes call. So what is kept here must hold
    no graph: Python's collector does not see cycles that lead through one, and each pass would stay
    in memory for ever.
    """

    def __init__(
        self,
        trained: Mapping[int, nn.Parameter],
        experts: Collection[tuple[FusedExperts, Mapping[str, Factors]]],
        lengths: tuple[int, ...],
    ) -> None:
        super().__init__()
        self._trained, self._lengths = trained, lengths
        self._num_tokens = sum(lengths)
        # What makes a result have a gradient; the graph behind a weight is read later, by rows.
        self._anchor = next(iter(trained.values()))
        self._uses: list[_Use] = []
        self._routed: dict[int, tuple[Factors, list[_RoutedUse]]] = {
            id(factors): (factors, []) for _, own in experts for factors in own.values()
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Keep products with what is trained, and sums with a trained row; do all else as ever."""
        if func is functional.linear and torch.is_grad_enabled():
            return self._linear(*args, **(kwargs or {}))
        is_sum = func in _SUMS and len(args) == 2 and not kwargs
        if is_sum and id(args[1]) in self._trained and args[1].ndim == 1:
            return self._added(*args)
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.requires_grad and self._is_of_tokens(input):
            keep = partial(self._keep, weight)
            y: Tensor = _Kept.apply(input, weight.detach(), self._anchor, keep)  # type: ignore[no-untyped-call]
            if bias is None:
                return y
            return self._added(y, bias) if bias.requires_grad else y + bias
        if bias is not None and bias.requires_grad and not weight.requires_grad:
            return self._added(functional.linear(input, weight), bias)
        return functional.linear(input, weight, bias)

    def _added(self, y: Tensor, bias: Tensor) -> Tensor:
        if not self._is_of_tokens(y):
            return y + bias
        keep = partial(self._keep, bias)
        total: Tensor = _Added.apply(y, bias.detach(), self._anchor, keep)  # type: ignore[no-untyped-call]
        return total

    def _is_of_tokens(self, x: Tensor) -> bool:
        return x.numel() == self._num_tokens * x.shape[-1]

    def _keep(self, weight: Tensor, given: Tensor, read: Tensor | None) -> None:
        read_TM = None if read is None else read.detach().flatten(0, -2)
        self._uses.append(_Use(weight, given.flatten(0, -2), read_TM))

    def routed(self, found: Mapping[str, Factors], expert: int, token_P: Tensor) -> Product:
        """Return what multiplies an expert's tokens, see ``FusedExperts.routed_product``."""

        def multiply(name: str, x_PM: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if name not in found:
                return functional.linear(x_PM, weight, bias)
            own = found[name]
            uses = self._routed[id(own)][1]

            def keep(given_PN: Tensor, read_PM: Tensor) -> None:
                uses.append(_RoutedUse(expert, token_P, given_PN, read_PM.detach()))

            y_PN: Tensor = _Kept.apply(x_PM, weight, self._anchor, keep)  # type: ignore[no-untyped-call]
            return y_PN if bias is None else y_PN + bias

        return multiply

    @torch.no_grad()
    def take(self) -> dict[int, Tensor]:
        """Return each row's gradients, (rows, *shape) in float32, by the parameter's id.

        Raises:
            UncoveredError: The backward pass gave a trained parameter a gradient of its own, so
                that it is used otherwise too.
        """
        try:
            return self._by_rows()
        finally:
            self._uses.clear()  # a weight that was made of what is trained has its graph
            for _, uses in self._routed.values():
                uses.clear()

    def _by_rows(self) -> dict[int, Tensor]:
        if any(parameter.grad is not None for parameter in self._trained.values()):
            raise UncoveredError
        lengths = torch.tensor(self._lengths)
        rows_T = torch.arange(len(lengths)).repeat_interleave(lengths)
        found: dict[int, Tensor] = {}
        for use in self._uses:
            rows_T = rows_T.to(use.given_TN.device)
            gradient = _of_rows(use, rows_T, len(lengths))
            if id(use.weight) in self._trained:
                _add(found, use.weight, gradient)
                continue
            sources = tuple(self._trained.values())
            handed = torch.autograd.grad(
                use.weight,
                sources,
                gradient.to(use.weight.dtype),
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
            )
            for source, own in zip(sources, handed, strict=True):
                if own is not None:
                    _add(found, source, own.float())
        for factors, uses in self._routed.values():
            if uses:
                for parameter, gradient in _of_factors(factors, uses, rows_T, len(lengths)):
                    _add(found, parameter, gradient)
        return found


def _add(found: dict[int, Tensor], parameter: Tensor, gradient: Tensor) -> None:
    before = found.get(id(parameter))
    found[id(parameter)] = gradient if before is None else before.add_(gradient)


def _of_rows(use: _Use, row_T: Tensor, num_rows: int) -> Tensor:
    """Return each row's gradient in what a product multiplied with, or in what was added."""
    given_TN = use.given_TN
    if use.read_TM is None:
        sums = torch.zeros(num_rows, given_TN.shape[1], device=given_TN.device)
        return sums.index_add_(0, row_T, given_TN.float())
    width, out = use.read_TM.shape[1], given_TN.shape[1]
    gradient = torch.zeros(num_rows, out, width, device=given_TN.device)
    for group in group_segments(row_T, num_rows, width=width + out):
        gradient[group.index_S] = group.pad(given_TN).mT @ group.pad(use.read_TM)
    return gradient.view(num_rows, *use.weight.shape)


def _of_factors(
    factors: Factors, uses: Collection[_RoutedUse], row_T: Tensor, num_rows: int
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield both factors of the experts of one parameter with each row's gradient."""
    given_PN = torch.cat([use.given_PN for use in uses])
    read_PM = torch.cat([use.read_PM for use in uses])
    segment_P = torch.cat([row_T[use.token_P] * factors.num_experts + use.expert for use in uses])
    A_ERM, B_ENR = (part.detach().float() for part in factors.blocks())
    num_experts, rank, width = A_ERM.shape
    out = B_ENR.shape[1]
    of_A = torch.zeros(num_rows * num_experts, rank, width, device=A_ERM.device)
    of_B = torch.zeros(num_rows * num_experts, out, rank, device=A_ERM.device)
    for group in group_segments(segment_P, num_rows * num_experts, width=width + out):
        expert_S = group.index_S % num_experts
        given_SLN, read_SLM = group.pad(given_PN), group.pad(read_PM)
        down_SLR = factors.scale * (given_SLN @ B_ENR[expert_S])
        of_A[group.index_S] = down_SLR.mT @ read_SLM
        of_B[group.index_S] = factors.scale * (given_SLN.mT @ (read_SLM @ A_ERM[expert_S].mT))
    if factors.A.requires_grad:
        yield factors.A, of_A.view(num_rows, *factors.A.shape)
    if factors.B.requires_grad:
        turned = of_B.view(num_rows, num_experts, out, rank).permute(0, 2, 3, 1)
        yield factors.B, turned.reshape(num_rows, *factors.B.shape)


class _Kept(torch.autograd.Function):
    """``functional.linear`` that tells of its gradient and gives its weight none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, anchor: Tensor, keep: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.keep = weight, keep
        return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.keep(given, x)
        dx = given @ ctx.weight if ctx.needs_input_grad[0] else None
        return dx, None, None, None


class _Added(torch.autograd.Function):
    """A sum with a row that tells of its gradient and gives the row none."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, bias: Tensor, anchor: Tensor, keep: Callable[..., None]
    ) -> Tensor:
        ctx.keep = keep
        return y + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.keep(given, None)
        return given, None, None, None


def why_row_by_row(view: MoEView) -> str:
    """Say why the rows of a pass cannot be told apart in gradients; nothing where they may be.

    Args:
        view: Of a model whose parameters to be trained have gradients switched on.
    """
    for layer in view.layers:
        own = [p for p in layer.experts.parameters() if p.requires_grad]
        if not own:
            continue
        if not isinstance(layer.storage, FusedExperts):
            return "its experts are modules of their own, which do not say whose tokens they read"
        if any(p.requires_grad for p in layer.storage.parameters()):
            return "its experts are trained themselves, and each row has a gradient of all of them"
    if any("capacity" in name for layer in view.layers for name in vars(layer.router)):
        return "its experts have a capacity, so that rows of a pass take each other's places"
    return ""
