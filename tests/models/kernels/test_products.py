"""Products with frozen matrices do not depend on how they are made, up to their rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from orchard.models.kernels import heads, products
from orchard.models.kernels.heads import cross_entropy, is_plain_head
from orchard.models.kernels.products import multiply_back, multiply_rows
from orchard.models.kernels.wide_products import wide_products

WIDTH, NUM_OUT = 24, 40


@pytest.fixture
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bfloat16, and blocks of five rows."""
    monkeypatch.setattr(products, "_has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "_BLOCK_BYTES", 5 * 4 * WIDTH)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.usefixtures("_slow")
@pytest.mark.parametrize("num_rows", [1, 7, 8, 30])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_widened_products_are_rounded_once(num_rows: int, is_transposed: bool) -> None:
    matrix = draw(WIDTH, NUM_OUT).t() if is_transposed else draw(NUM_OUT, WIDTH)
    x, dy = draw(num_rows, WIDTH, seed=1), draw(num_rows, NUM_OUT, seed=2)
    for multiply, factor, exact in (
        (multiply_rows, x, x.double() @ matrix.double().t()),
        (multiply_back, dy, dy.double() @ matrix.double()),
    ):
        y = multiply(factor, matrix)
        assert y.dtype == torch.bfloat16
        # bfloat16 has eight bits: half a unit is 1/256 of a number near a power of two.
        torch.testing.assert_close(y.double(), exact, rtol=1 / 250, atol=1e-3)
        kind = "out_TN" if multiply is multiply_rows else "out_TM"
        out = torch.empty_like(y)
        assert multiply(factor, matrix, **{kind: out}) is out
        assert torch.equal(out, y)


@pytest.mark.usefixtures("_slow")
def test_frozen_layers_are_widened_and_trained_ones_are_not() -> None:
    layer = nn.Linear(WIDTH, NUM_OUT, dtype=torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    x = draw(2, 9, WIDTH, seed=1)
    expected = functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with wide_products(model):
        assert "forward" in vars(layer)
        own = x.clone().requires_grad_()
        y = model(own)
        torch.autograd.backward(y, torch.ones_like(y))
        assert type(y.grad_fn).__name__ == "_WideBackward"
        layer.requires_grad_(True)
        assert type(model(own).grad_fn).__name__ != "_WideBackward"
    assert "forward" not in vars(layer)
    torch.testing.assert_close(y.double(), expected, rtol=1 / 100, atol=1e-2)
    assert own.grad is not None
    summed = layer.weight.double().sum(dim=0).expand_as(own)
    torch.testing.assert_close(own.grad.double(), summed, rtol=1 / 100, atol=1e-2)


def test_float32_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False))
    with wide_products(model):
        assert "forward" not in vars(model[0])


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_losses_in_blocks_are_those_of_all_logits(
    rows: int, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "_BLOCK_BYTES", rows * 4 * NUM_OUT)
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, NUM_OUT, bias=has_bias).requires_grad_(False)
    hidden, weight = torch.randn(11, WIDTH), torch.rand(11)
    targets = torch.arange(11) * 3
    found = []
    for run in (
        lambda x: cross_entropy(head, x, targets),
        lambda x: functional.cross_entropy(head(x), targets, reduction="none"),
    ):
        own = hidden.clone().requires_grad_()
        losses = run(own)
        torch.autograd.backward((losses * weight).sum())
        assert own.grad is not None
        found.append((losses.detach(), own.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(head, hidden, targets), found[0][0])


def test_a_head_that_is_trained_or_wrapped_is_not_plain() -> None:
    head = nn.Linear(4, 4).requires_grad_(False)
    assert is_plain_head(head)
    assert not is_plain_head(head.requires_grad_(True))
    assert not is_plain_head(nn.Embedding(4, 4).requires_grad_(False))
