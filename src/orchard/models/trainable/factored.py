"""Adapters of fused experts as what they are: two small products for the tokens an expert reads.

PEFT adds ``scale * B A`` to the weights of all experts of a layer before it multiplies, and its
backward pass makes a gradient of all of them: both are as large as the layer's experts, whichever
few of them a pass reads. Here each expert's tokens are multiplied with its weights, which stay as
they are, and with its own A and B, as LoRA is written (Hu et al., 2021, arXiv:2106.09685, eq. 3).
Values and gradients are the same but for rounding; in bfloat16 those are nearer to exact, because
no small change is rounded into a large weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional

from orchard.models.kernels.wide_products import frozen_linear
from orchard.models.view.moe import MoEView
from orchard.models.view.storage import ExpertStorage, FusedExperts, Product


@dataclass(frozen=True)
class Factors:
    """The adapter of all experts of one parameter: A is (E * R, in), B is (out, R * E).

    Attributes:
        A: What is read with.
        B: What is written with.
        scale: What multiplies both.
        num_experts: E.
        dtype: Of the weights that it is added to.
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    num_experts: int
    dtype: torch.dtype

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Return both by experts, (E, R, in) and (E, out, R), in the dtype of the weights."""
        A_ERM = self.A.view(self.num_experts, -1, self.A.shape[1])
        B_NRE = self.B.view(len(self.B), -1, self.num_experts)
        # Each expert's own in one piece, so that products do not depend on how many there are.
        return A_ERM.to(self.dtype), B_NRE.permute(2, 0, 1).to(self.dtype).contiguous()


def find_wrappers(model: nn.Module) -> Iterator[tuple[ParamWrapper, Factors]]:
    """Yield every adapter of a fused parameter with the module that PEFT puts around it."""
    for module in model.modules():
        if isinstance(module, ParamWrapper) and module.get_param().ndim == 3:
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            parameter = module.get_param()
            scale = module.scaling["default"]
            yield module, Factors(A, B, scale, len(parameter), parameter.dtype)


LEAST_FACTORED = 1 << 20
"""Width times hidden width of an expert from which two products more cost less than a sum with the
weights of all experts. How many experts are held and how much is read at a time does not decide it:
both are settings of memory, which change no bits."""


@contextmanager
def factored_experts(view: MoEView, *, least: int = LEAST_FACTORED) -> Iterator[None]:
    """Let adapters of large fused experts run as two products, inside ``unbound_experts``.

    A layer whose adapters PEFT has merged or switched off keeps what it has, and so does one inside
    another such context.

    Args:
        view: Of the model.
        least: Width times hidden width of an expert from which its layer does.
    """
    with ExitStack() as undo:
        large = {
            id(storage.module): storage
            for storage in (layer.storage for layer in view.layers)
            if is_factored(storage, least=least) and _is_free(storage)
        }
        own: dict[int, list[tuple[ParamWrapper, Factors]]] = {}
        for wrapper, factors in find_wrappers(view.model) if large else ():
            own.setdefault(id(wrapper.get_base_layer()), []).append((wrapper, factors))
        for key in own.keys() & large.keys():
            found, storage = own[key], large[key]
            if any(_is_otherwise(wrapper) for wrapper, _ in found):
                continue
            named = {wrapper.parameter_name: factors for wrapper, factors in found}
            storage.begin_products = partial(_begin, named)
            undo.callback(setattr, storage, "begin_products", None)
            for wrapper, _ in found:
                # A module would be made a part of it.
                wrapper.forward = partial(nn.Module.__call__, wrapper.base_layer)
                undo.callback(delattr, wrapper, "forward")
        yield


def is_factored(storage: ExpertStorage, *, least: int = LEAST_FACTORED) -> TypeGuard[FusedExperts]:
    """Say whether adapters of these experts run as two products."""
    is_large = storage.width * storage.expert_width >= least
    return is_large and isinstance(storage, FusedExperts)


def _is_free(storage: FusedExperts) -> bool:
    """Say whether experts run by ``run_routed``, as masked ones do too, and not so already."""
    return "forward" in vars(storage.module) and storage.begin_products is None


def _is_otherwise(wrapper: ParamWrapper) -> bool:
    is_off = wrapper.disable_adapters or wrapper.merged
    return bool(is_off or wrapper.active_adapters != ["default"])


def _begin(named: Mapping[str, Factors]) -> Callable[[int, Tensor], Product]:
    """Return, for one pass, from an expert and its tokens to what multiplies these."""
    blocks = {}
    for name, factors in named.items():
        A_ERM, B_ENR = factors.blocks()
        blocks[name] = A_ERM.unbind(), B_ENR.unbind(), factors.scale

    def product_of(expert: int, token_P: Tensor) -> Product:
        def multiply(name: str, x_PM: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y_PN = frozen_linear(x_PM, weight, bias)
            if name not in blocks:
                return y_PN
            A, B, scale = blocks[name]
            down_PR = functional.linear(x_PM, A[expert]) * scale
            return y_PN + functional.linear(down_PR, B[expert])

        return multiply

    return product_of
