"""Frozen experts in one function give what the model's own forward gives, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchard.models.view.detection import view_moe
from orchard.models.view.moe import MoELayer
from orchard.models.view.storage import FusedExperts
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


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "nemotron_h"])
def test_who_chose_no_expert_gets_nothing_and_gives_no_gradient(family: str) -> None:
    layer = fused_layer(family)
    x_TD, choices_TK, weights_TK = draw(layer)
    expected = run(layer.storage.run_routed, [x_TD, choices_TK[:, :1], weights_TK[:, :1]])  # type: ignore[attr-defined]
    choices_TK[:, 1:] = layer.num_experts
    y_TD, dx_TD, dweights_TK = run(layer.storage.run_routed, [x_TD, choices_TK, weights_TK])  # type: ignore[attr-defined]
    torch.testing.assert_close(y_TD, expected[0])
    torch.testing.assert_close(dx_TD, expected[1])
    torch.testing.assert_close(dweights_TK[:, :1], expected[2])
    assert not dweights_TK[:, 1:].any()
    choices_TK[:] = layer.num_experts
    assert not run(layer.storage.run_routed, [x_TD, choices_TK, weights_TK])[0].any()  # type: ignore[attr-defined]


def test_the_backward_pass_keeps_one_tensor_of_pairs() -> None:
    layer = fused_layer("qwen2_moe")
    x_TD, choices_TK, weights_TK = draw(layer)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.storage.run_routed(x_TD.requires_grad_(), choices_TK, weights_TK)  # type: ignore[attr-defined]
    num_pairs = NUM_TOKENS * TOP_K
    assert sum(t.numel() for t in kept) == num_pairs * 2 * layer.expert_width + weights_TK.numel()


def test_widened_products_are_those_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for has in (True, False):
        monkeypatch.setattr("orchard.models.kernels.products._has_bfloat16", lambda has=has: has)
        layer = fused_layer("aria")
        layer.experts.to(torch.bfloat16)
        found[has] = run(layer.storage.run_routed, draw(layer, torch.bfloat16))  # type: ignore[attr-defined]
    for own, other in zip(found[False], found[True], strict=True):
        # Two roundings of 1/256 each, one before and one behind the activation.
        scale = float(other.abs().max())
        torch.testing.assert_close(own, other, rtol=0.02, atol=0.02 * scale)
