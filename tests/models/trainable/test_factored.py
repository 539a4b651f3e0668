"""Adapters of experts as two products give what PEFT's sum with the weights gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from orchard.evaluation.loss import forward_losses
from orchard.experts.masking import detached_experts
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.factored import factored_experts
from orchard.models.view.moe import MoEView
from orchard.models.view.unbinding import unbound_experts
from tiny_adapted import adapt, examples, stir
from tiny_checkpoints import LISTED
from tiny_models import FAMILIES

# Gated and not, with biases, transposed, interleaved.
QUICK = ("qwen2_moe", "gpt_oss", "llama4")


def losses_and_gradients(
    model: AdaptedModel, ways: Callable[[MoEView], AbstractContextManager[None]]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.set_trainable(model.adapter_names)
    try:
        with unbound_experts(model.view), ways(model.view):
            losses_T, _ = forward_losses(model, examples(4), with_router_loss=False, packed=True)
            torch.autograd.backward(losses_T.sum())
        return losses_T.detach(), {
            name: own.clone() for name, own in model.gradients(model.adapter_names).items()
        }
    finally:
        model.drop_gradients()
        model.set_trainable(())


def factored(view: MoEView) -> AbstractContextManager[None]:
    return factored_experts(view, least=0)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
        for name in FAMILIES
        if name not in LISTED
    ],
)
def test_values_and_gradients_are_those_of_the_sum(family: str) -> None:
    model = adapt(family, extra=("experts",))
    stir(model)
    summed, of_sum = losses_and_gradients(model, lambda view: nullcontext())
    found, of_factors = losses_and_gradients(model, factored)
    torch.testing.assert_close(found, summed, rtol=1e-4, atol=1e-5)
    assert of_factors.keys() == of_sum.keys()
    longest = max(float(own.norm()) for own in of_sum.values())
    assert longest > 0
    for name, own in of_sum.items():
        torch.testing.assert_close(of_factors[name], own, rtol=1e-3, atol=1e-5 * longest)


def test_no_weight_with_an_adapter_in_it_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapt(extra=("experts",))

    def fail(*others: object) -> None:
        raise AssertionError("PEFT was to make all experts' weights")

    monkeypatch.setattr(ParamWrapper, "_activate_lora", fail)
    losses_and_gradients(model, factored)
    with pytest.raises(AssertionError, match="PEFT was to make"):
        losses_and_gradients(model, factored_experts)  # experts are too small for it to pay


def test_masked_experts_run_so_too_and_a_context_inside_leaves_the_outer_one() -> None:
    model = adapt(extra=("experts",))
    stir(model)
    mask = tuple(torch.arange(layer.num_experts) % 2 == 0 for layer in model.view.layers)

    @contextmanager
    def twice(view: MoEView) -> Iterator[None]:
        with factored(view):
            with factored(view):
                pass
            assert all(layer.storage.begin_products for layer in view.layers)
            yield

    with detached_experts(model.view) as switch:
        switch.learning = mask
        losses_T, gradients = losses_and_gradients(model, lambda view: nullcontext())
        own_T, own = losses_and_gradients(model, twice)
    torch.testing.assert_close(own_T, losses_T, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-5)
    still = [name for name, gradient in gradients.items() if ".experts.1." in name]
    assert still
    assert all(not gradients[name].any() for name in still)


def test_nothing_is_left_behind() -> None:
    model = adapt(extra=("experts",))
    stir(model)
    before, _ = losses_and_gradients(model, lambda view: nullcontext())
    losses_and_gradients(model, factored)
    after, _ = losses_and_gradients(model, lambda view: nullcontext())
    assert torch.equal(before, after)
    wrappers = [own for own in model.model.modules() if isinstance(own, ParamWrapper)]
    assert wrappers
    assert all("forward" not in vars(own) for own in wrappers)
    assert all(layer.storage.begin_products is None for layer in model.view.layers)


def test_adapters_that_are_switched_off_stay_off() -> None:
    model = adapt(extra=("experts",))
    stir(model)
    for own in model.model.modules():
        if isinstance(own, ParamWrapper):
            own.enable_adapters(enabled=False)
    outputs = []
    for ways in (lambda view: nullcontext(), factored):
        with torch.no_grad(), unbound_experts(model.view), ways(model.view):
            outputs.append(forward_losses(model, examples(4), packed=True)[0])
    assert torch.equal(*outputs)
