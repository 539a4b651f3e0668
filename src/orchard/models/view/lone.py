"""What a router gives an expert that is the only one: a block with all others out of the way.

The weight that multiplies the output of a lone expert is 1 where a family makes a softmax of its
scores, ``routed_scaling_factor`` where it multiplies by one afterwards, and a number for each token
where it takes sigmoids that it does not normalize. So it is not derived but read: the family's own
router runs with the scores of all other experts far below any real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from orchard.models.view.moe import MoELayer
from orchard.models.view.routers import find_rows, read_router_output

_FAR = 1e4  # exp(-10000) is 0 in every dtype, and float16 still holds it
_PRODUCTS = (functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_SCORES = (0.0, 2.0, -3.0)
_SIGMOIDS = 1.4621171572600098  # sigmoid(1) / sigmoid(0); e for a softmax


@dataclass(frozen=True)
class LoneExperts:
    """How a layer's router weighs experts, each alone and some together.

    Attributes:
        layer: The layer.
        factor_E: The weight of each lone expert where it is the same for every token, (E,) float64;
            None where it is not.
        takes_sigmoids: Whether the weights of several go by sigmoids of scores, not by
            exponentials.
    """

    layer: MoELayer
    factor_E: Tensor | None
    takes_sigmoids: bool

    @property
    def is_one(self) -> bool:
        """Whether every lone expert answers as it is: products with 1 can be left out."""
        return self.factor_E is not None and bool((self.factor_E == 1).all())

    @torch.no_grad()
    def weights(self, x_TD: Tensor) -> Tensor:
        """Return what the block multiplies each expert's output with where it is the only one.

        Args:
            x_TD: What the block reads.

        Returns:
            (E, T), float64.
        """
        if self.factor_E is not None:
            return self.factor_E.to(x_TD.device)[:, None].expand(-1, len(x_TD))
        return _lone_weights(self.layer, x_TD, scores_T=None)


@torch.no_grad()
def read_lone(layer: MoELayer) -> LoneExperts:
    """Let a router weigh a few tokens, to see what it gives a lone expert.

    Raises:
        ValueError: The router's scores are no product with one row per expert.
    """
    weight_ED = layer.router_tensors()["weight"]
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(len(_SCORES), layer.reads_width, generator=generator).to(weight_ED)
    weights_ET = _lone_weights(layer, x_TD, scores_T=torch.tensor(_SCORES))
    spread_E = weights_ET.amax(1) - weights_ET.amin(1)
    is_constant = bool((spread_E <= 1e-6 * weights_ET.abs().amax(1)).all())
    factor_E = weights_ET[:, 0].clone() if is_constant else None
    return LoneExperts(layer, factor_E, _takes_sigmoids(layer, x_TD[:1]))


def _lone_weights(layer: MoELayer, x_TD: Tensor, *, scores_T: Tensor | None) -> Tensor:
    scores_TX = None if scores_T is None else scores_T[:, None]
    return torch.stack(
        [
            _route(layer, x_TD, [expert], scores_TX=scores_TX)[expert]
            for expert in range(layer.num_experts)
        ]
    )


def _takes_sigmoids(layer: MoELayer, x_TD: Tensor) -> bool:
    if layer.num_experts < 2 or layer.top_k < 2:
        return False
    pair = _route(layer, x_TD, [0, 1], scores_TX=torch.tensor([[1.0, 0.0]]))
    first, second = float(pair[0]), float(pair[1])
    return second > 0 and abs(first / second - _SIGMOIDS) < 0.01


def _route(
    layer: MoELayer, x_TD: Tensor, experts: Sequence[int], *, scores_TX: Tensor | None
) -> dict[int, Tensor]:
    """Return the weights (T,) of some experts where there are no others, by expert.

    Args:
        layer: The layer.
        x_TD: What its block reads.
        experts: Which.
        scores_TX: Theirs, to take in the place of what the router makes of ``x_TD``.
    """
    width = layer.router_tensors()["weight"].shape[1]
    others = _WithoutOthers(layer.num_experts, layer.num_rows, width, experts, scores_TX)
    enter = layer.router.register_forward_pre_hook(others.begin)
    leave = layer.router.register_forward_hook(others.end, always_call=True)
    try:
        choices_TK, weights_TK = _choose(layer, x_TD, _raised(layer, experts))
    finally:
        enter.remove()
        leave.remove()
    if not others.is_seen:
        raise ValueError(
            f"router of {layer.name} must score experts by a product with one row for each, got "
            f"{type(layer.router).__name__}, which does not; choose another checkpoint"
        )
    return {
        expert: torch.where(choices_TK == expert, weights_TK.double(), 0).sum(-1)
        for expert in experts
    }


def _choose(layer: MoELayer, x_TD: Tensor, changed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Let a block route, and stop it before its experts run."""
    # A copy: a block may add its jitter to what it reads in place.
    x_BSD = x_TD.unsqueeze(0).clone()
    if layer.is_whole_layer or not layer.is_fused:
        output = layer.router(x_BSD)
        routing = read_router_output(output, num_experts=layer.num_experts, block=layer.block)
        return routing.choices_TK, routing.weights_TK
    seen: list[tuple[Tensor, Tensor]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, choices_TK, weights_TK = (*args, *kwargs.values())[:3]
        seen.append((choices_TK, weights_TK))
        raise _RoutedError

    handle = layer.experts.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        functional_call(layer.block, dict(changed), (x_BSD,))
    except _RoutedError:
        pass
    finally:
        handle.remove()
    ((choices_TK, weights_TK),) = seen
    return choices_TK, weights_TK


def _raised(layer: MoELayer, experts: Sequence[int]) -> dict[str, Tensor]:
    """Return the correction that steers the choice, by its name in the block, raised for experts.

    It is in no weight, but could choose others, whose weights are zero.
    """
    rows = find_rows(layer.router, layer.block, num_experts=layer.num_experts)
    if "correction_bias" not in rows:
        return {}
    holder, attribute = rows["correction_bias"]
    old = getattr(holder, attribute)
    raised = old.detach().clone()
    raised.view(-1)[list(experts)] += _FAR
    named = [*layer.block.named_parameters(), *layer.block.named_buffers()]
    return {name: raised for name, tensor in named if tensor is old}


class _RoutedError(Exception):
    """The block has chosen; there is no need to run experts."""


class _WithoutOthers(TorchFunctionMode):
    """While a router runs, the scores of all but some experts are far below any real one."""

    def __init__(
        self,
        num_experts: int,
        num_rows: int,
        width: int,
        experts: Sequence[int],
        scores_TX: Tensor | None,
    ) -> None:
        super().__init__()
        self._num_experts = num_experts
        self._shapes = ((num_rows, width), (width, num_rows))
        self._experts, self._scores_TX = list(experts), scores_TX
        self.is_seen = False

    def begin(self, *_: Any) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _PRODUCTS or not self._is_scoring(args):
            return result
        self.is_seen = True
        alone = torch.full_like(result, -_FAR)
        # Rows that are no expert's are there however many experts are.
        alone[..., self._num_experts :] = result[..., self._num_experts :]
        own = result[..., self._experts]
        if self._scores_TX is not None:
            own = self._scores_TX.to(own).expand(own.shape)
        alone[..., self._experts] = own
        return alone

    def _is_scoring(self, args: tuple[Any, ...]) -> bool:
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        return any(tuple(tensor.shape) in self._shapes for tensor in tensors[1:])
