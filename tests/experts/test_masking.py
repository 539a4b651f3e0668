from __future__ import annotations

import pytest
import torch

from orchard.experts.masking import detached_experts
from orchard.experts.selection import ExpertMask
from orchard.models.view.detection import view_moe
from orchard.models.view.moe import MoEView
from tiny_adapted import adapt, stir
from tiny_models import EXPERTS, FAMILIES, batch_of

SMALL = ["qwen2_moe", "olmoe", "granitemoe", "deepseek_moe_16b"]


def every_third(view: MoEView) -> ExpertMask:
    return tuple(torch.arange(EXPERTS) % 3 == 0 for _ in view.layers)


def none(view: MoEView) -> ExpertMask:
    return tuple(torch.zeros(EXPERTS, dtype=torch.bool) for _ in view.layers)


@pytest.mark.parametrize("chosen", [every_third, none])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_keeps_its_value(family: str, chosen: object) -> None:
    model = FAMILIES[family]()
    model.requires_grad_(True)
    view, batch = view_moe(model), batch_of(model, num_padding=2)
    plain = model(**batch).logits
    with detached_experts(view) as switch:
        switch.learning = chosen(view)  # type: ignore[operator]
        masked = model(**batch).logits
        assert masked.requires_grad
        with torch.no_grad():
            # GPT-OSS adds its biases in another order.
            torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"switch"}))
def test_the_forward_pass_with_adapters_keeps_its_value(family: str) -> None:
    adapted = adapt(family, targets=("experts", "router"))
    stir(adapted)
    adapted.set_trainable(adapted.adapter_names)
    batch = batch_of(adapted.model)
    plain = adapted.model(**batch).logits
    with detached_experts(adapted.view) as switch:
        switch.learning = every_third(adapted.view)
        masked = adapted.model(**batch).logits
    torch.testing.assert_close(masked, plain, rtol=1e-5, atol=1e-5)
    masked.square().mean().backward()
    gradients = adapted.gradients(adapted.adapter_names)
    moves = {name: bool(gradient.any()) for name, gradient in gradients.items()}
    for name, is_moved in moves.items():
        if ".experts." in name:
            expert = int(name.partition(".experts.")[2].partition(".")[0])
            assert not is_moved or expert % 3 == 0
    assert any(is_moved for name, is_moved in moves.items() if ".experts." in name)
    assert any(is_moved for name, is_moved in moves.items() if ".router." in name)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"switch"}))
def test_learning_experts_of_the_last_layer_learn_as_without_a_mask(family: str) -> None:
    """What comes after the layer has the same values, so its gradient is the same."""
    model = FAMILIES[family]()
    model.requires_grad_(True)
    view, batch = view_moe(model), batch_of(model)
    layer = view.layers[-1]
    gradients = []
    for chosen in (None, every_third(view)):
        model.zero_grad()
        with detached_experts(view) as switch:
            switch.learning = chosen
            model(**batch).logits.square().mean().backward()
        found = []
        for expert in range(EXPERTS):
            for parameter, part in layer.storage.slices(expert).values():
                gradient = parameter.grad
                found.append(
                    torch.zeros_like(part(parameter)) if gradient is None else part(gradient)
                )
        gradients.append([tensor.clone() for tensor in found])
    per_expert = len(gradients[0]) // EXPERTS
    for position, (plain, masked) in enumerate(zip(*gradients, strict=True)):
        if (position // per_expert) % 3 == 0:
            torch.testing.assert_close(masked, plain, rtol=1e-4, atol=1e-6)
        else:
            assert not masked.any()


@pytest.mark.parametrize("family", SMALL)
def test_a_router_learns_from_tokens_of_detached_experts(family: str) -> None:
    """Its gradient is that of a weighted sum of constants, computed here by hand."""
    model = FAMILIES[family]()
    view = view_moe(model)
    layer = view.layers[-1]
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(9, layer.width, generator=generator)
    weights_TD = torch.randn(9, layer.width, generator=generator)
    router = layer.router_tensors()["weight"]
    with detached_experts(view) as switch:
        switch.learning = none(view)
        output = layer.block(x_TD.unsqueeze(0))
    y_TD = (output[0] if isinstance(output, tuple) else output).reshape(9, -1)
    (own,) = torch.autograd.grad((y_TD * weights_TD).sum(), router)

    choices_TK, scale_TK = layer.route(x_TD)
    outputs = [layer.run_expert(expert, x_TD).detach() for expert in range(EXPERTS)]
    all_TED = torch.stack(outputs, dim=1)
    chosen_TKD = all_TED.gather(1, choices_TK.unsqueeze(-1).expand(-1, -1, layer.width))
    by_hand = ((scale_TK.unsqueeze(-1) * chosen_TKD).sum(dim=1) * weights_TD).sum()
    (expected,) = torch.autograd.grad(by_hand, router)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_moe_16b"])
def test_nothing_is_left_behind(family: str) -> None:
    model = FAMILIES[family]()
    view = view_moe(model)
    with detached_experts(view) as switch:
        switch.learning = none(view)
        model(**batch_of(model))
    for layer in view.layers:
        assert "forward" not in vars(layer.experts)
        assert not any(module._forward_hooks for module in layer.experts.modules())
