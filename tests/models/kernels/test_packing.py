"""Rows behind each other give what each gives alone, and never read each other."""

from __future__ import annotations

import pytest
import torch

from orchard.data.encoded import Encoded
from orchard.evaluation.loss import forward_losses
from orchard.experts.observation import LayerPass, watch_routing
from orchard.models.kernels.packing import can_pack, pack, packed_attention, rows_of
from tiny_adapted import adapt, example_of, examples, stir
from tiny_models import FAMILIES

# Recurrent states, attention that needs the family's own kernel, and a model of remote code.
PADDED = {"qwen3_next", "nemotron_h", "gpt_oss", "deepseek_moe_16b"}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"switch"}))
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(family: str) -> None:
    model = adapt(family)
    stir(model)
    assert can_pack(model.model, longest=9) == (family not in PADDED)
    model.set_trainable(model.adapter_names)
    found = []
    for packed in (False, True):
        losses_T, _ = forward_losses(model, examples(5), packed=packed)
        torch.autograd.backward(losses_T.sum())
        gradients = model.gradients(model.adapter_names)
        found.append((losses_T.detach(), {n: g.clone() for n, g in gradients.items()}))
        model.drop_gradients()
    (losses_T, gradients), (packed_T, packed_gradients) = found
    torch.testing.assert_close(packed_T, losses_T, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        atol = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"switch"} - PADDED))
def test_what_is_no_number_spoils_its_own_row_alone(family: str) -> None:
    model = adapt(family).model
    rows = pack([[5, 6, 7], [8, 9, 10, 11], [12, 13]], torch.device("cpu"))

    def spoil(module: torch.nn.Module, args: object, embedded: torch.Tensor) -> torch.Tensor:
        embedded = embedded.clone()
        embedded[0, 3] = torch.nan
        return embedded

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(spoil)
    with torch.no_grad(), packed_attention(model):
        logits = model(**rows.arguments(), use_cache=False).logits[0]
    handle.remove()
    is_spoiled = ~logits.isfinite().all(dim=-1)
    assert is_spoiled.tolist() == [False] * 3 + [True] * 4 + [False] * 2


def test_a_window_shorter_than_a_row_forbids_packing() -> None:
    model = adapt("mixtral").model
    assert can_pack(model, longest=100)
    model.config.sliding_window = 8
    assert can_pack(model, longest=8)
    assert not can_pack(model, longest=9)
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert not can_pack(model, longest=8)


def test_attention_is_as_it_was_afterwards() -> None:
    model = adapt().model
    before = model.config._attn_implementation
    with packed_attention(model):
        assert model.config._attn_implementation != before
        with packed_attention(model):
            pass
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


def test_the_balance_of_packed_routers_is_that_without_padding() -> None:
    model = adapt()
    stir(model)
    with torch.no_grad():
        _, padded = forward_losses(model, examples(3), with_router_loss=True, packed=False)
        _, packed = forward_losses(model, examples(3), with_router_loss=True)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


def test_routing_of_packed_rows_knows_whose_a_token_is() -> None:
    model = adapt()
    data: list[Encoded] = [example_of(4, 2), example_of(7, 2)]
    seen: list[tuple[LayerPass, ...]] = []
    with torch.no_grad(), watch_routing(model.view, seen.append):
        forward_losses(model, data, packed=False)
        forward_losses(model, data)
    padded, packed = seen
    for one, other in zip(padded, packed, strict=True):
        assert one.sample_T.tolist() == [0] * 4 + [1] * 7
        assert torch.equal(one.sample_T, other.sample_T)
        assert torch.equal(one.choices_TK, other.choices_TK)
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert rows_of({"input_ids": ids}).tolist() == [0, 0, 0, 1, 1, 1]
