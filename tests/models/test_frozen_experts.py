"""Frozen experts in one function give what the model's own forward gives, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchard.models.detection import view_moe
from orchard.models.moe import MoELayer
from orchard.models.storage import FusedExperts
from tiny_models import FAMILIES

NUM_TOKENS, TOP_K = 23, 3


def fused_layer(family: str) -> MoELayer:
    model = FAMILIES[family]()
    model.requires_grad_(False)
    layer = view_moe(model).layers[-1]
    assert isinstance(layer.storage, FusedExperts)
    return layer


def draw(layer: MoELayer, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Draw states, choices of different experts for each token, and weights."""
    generator = torch.Generator().manual_seed(3)
    scores_TE = torch.rand(NUM_TOKENS, layer.num_experts, generator=generator)
    weights_TK, choices_TK = scores_TE.topk(TOP_K, dim=-1)
    x_TD = torch.randn(NUM_TOKENS, layer.width, generator=generator)
    return [x_TD.to(dtype), choices_TK, weights_TK.to(dtype)]


def run(forward: Any, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    x_TD, choices_TK, weights_TK = inputs
    x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    y_TD = forward(x_TD, choices_TK, weights_TK)
    torch.manual_seed(7)
    torch.autograd.backward(y_TD, torch.randn_like(y_TD))
    assert x_TD.grad is not None
    assert weights_TK.grad is not None
    return y_TD.detach(), x_TD.grad, weights_TK.grad


FUSED = sorted(FAMILIES.keys() - {"switch", "deepseek_moe_16b"})


@pytest.mark.parametrize("family", FUSED)
def test_values_and_gradients_are_those_of_the_models_own_forward(family: str) -> None:
    layer = fused_layer(family)
    inputs = draw(layer)
    expected = run(layer.experts, inputs)
    found = run(layer.storage.run_routed, inputs)  # type: ignore[attr-defined]
    for own, other in zip(found, expected, strict=True):
        assert float(other.abs().max()) > 1e-3
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
