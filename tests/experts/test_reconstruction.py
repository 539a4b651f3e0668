"""The expert that alone comes closest to its layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchard.experts.reconstruction import (
    batch_blocks,
    choose_at_random,
    choose_by_reconstruction,
    reconstruction_losses,
)
from orchard.models.view.detection import view_moe
from orchard.models.view.moe import MoELayer, MoEView
from tiny_adapted import adapt, stir
from tiny_models import EXPERTS, FAMILIES, VOCABULARY, WIDTH, batch_of, build

LONE = {"deepseek_v2": 1.5, "deepseek_v3": 2.5}  # routed_scaling_factor, where it is not 1
EVERY = [family for family in FAMILIES if family != "switch"]  # an encoder-decoder
SOME = ["qwen2_moe", "deepseek_v3", "deepseek_moe_16b", "gpt_oss", "granitemoe", "afmoe", "mixtral"]


def corpus(num_batches: int = 3, *, seed: int = 0, low: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, VOCABULARY, (2, 6), generator=generator) for _ in range(num_batches)]


def see_blocks(view: MoEView, batches: list[Tensor]) -> list[tuple[MoELayer, Tensor, Tensor]]:
    """Return each layer with what its block read and returned, for every batch."""
    seen: list[tuple[MoELayer, Tensor, Tensor]] = []

    def watch(layer: MoELayer) -> Callable[..., None]:
        def see(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            seen.append((layer, x, output[0] if isinstance(output, tuple) else output))

        return see

    handles = [
        layer.block.register_forward_hook(watch(layer), with_kwargs=True) for layer in view.layers
    ]
    with torch.no_grad():
        for batch_BS in batches:
            view.model(input_ids=batch_BS)
    for handle in handles:
        handle.remove()
    return seen


def shared_output(layer: MoELayer, x_BSD: Tensor) -> Tensor:
    """Compute the output of a block's shared experts from the family's own formula."""
    total = torch.zeros_like(x_BSD)
    for shared in layer.shared_experts:
        y = shared(x_BSD)
        if hasattr(layer.block, "shared_expert_gate"):
            y = torch.sigmoid(layer.block.shared_expert_gate(x_BSD)) * y  # type: ignore[operator]
        total = total + y
    return total


def expert_output(layer: MoELayer, expert: int, x_TD: Tensor) -> Tensor:
    """Compute one expert's output from its tensors and the family's own formula."""
    t = layer.expert_tensors(expert)
    if "gate_proj" not in t:  # Nemotron-H
        return nn.functional.relu(x_TD @ t["up_proj"].T).square() @ t["down_proj"].T
    gate, up = x_TD @ t["gate_proj"].T, x_TD @ t["up_proj"].T
    if "gate_proj_bias" in t:  # GPT-OSS
        gate = (gate + t["gate_proj_bias"]).clamp(max=7.0)
        up = (up + t["up_proj_bias"]).clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return hidden @ t["down_proj"].T + t["down_proj_bias"]
    return (nn.functional.silu(gate) * up) @ t["down_proj"].T


@torch.no_grad()
def brute_force(
    view: MoEView, batches: list[Tensor], weigh: Callable[[MoELayer, int, Tensor], Tensor]
) -> list[Tensor]:
    """Put each expert in the place of the layer's routed output, with what a router gives it."""
    losses = {layer.name: torch.zeros(EXPERTS, dtype=torch.float64) for layer in view.layers}
    for layer, x_BSD, y_BSD in see_blocks(view, batches):
        routed_TD = (y_BSD - shared_output(layer, x_BSD)).reshape(-1, WIDTH)
        for expert in range(EXPERTS):
            x_TD = x_BSD.reshape(-1, WIDTH)
            alone_TD = expert_output(layer, expert, x_TD) * weigh(layer, expert, x_TD)[:, None]
            losses[layer.name][expert] += (routed_TD - alone_TD).double().square().sum().sqrt()
    return list(losses.values())


def sigmoid_of_score(layer: MoELayer, expert: int, x_TD: Tensor) -> Tensor:
    return torch.sigmoid(x_TD @ layer.router_tensors()["weight"][expert])


def unnormalized() -> nn.Module:
    """Build a DeepSeek-V3 whose weights are sigmoids, not divided by their sum."""
    config = copy.deepcopy(FAMILIES["deepseek_v3"]().config)
    model = build("DeepseekV3Config", **{**config.to_dict(), "norm_topk_prob": False})
    return model.eval()


@pytest.mark.parametrize("family", [*EVERY, "unnormalized"])
def test_losses_and_choices_equal_brute_force(family: str) -> None:
    model = unnormalized() if family == "unnormalized" else FAMILIES[family]()
    view, batches = view_moe(model), corpus()

    def weigh(layer: MoELayer, expert: int, x_TD: Tensor) -> Tensor:
        if family == "unnormalized":
            return 2.5 * sigmoid_of_score(layer, expert, x_TD)
        return torch.full((len(x_TD),), LONE.get(family, 1.0))

    losses, expected = reconstruction_losses(view, batches), brute_force(view, batches, weigh)
    assert len(losses) == len(expected) == len(view.layers)
    for found, brute in zip(losses, expected, strict=True):
        torch.testing.assert_close(found, brute, rtol=1e-4, atol=1e-4)
    assert choose_by_reconstruction(losses) == tuple(int(brute.argmin()) for brute in expected)


@pytest.mark.parametrize("family", SOME)
def test_a_layer_has_as_many_candidates_as_experts(family: str) -> None:
    losses = reconstruction_losses(view_moe(FAMILIES[family]()), corpus(1))
    assert all(loss_E.shape == (EXPERTS,) for loss_E in losses)
    assert all(loss_E.dtype == torch.float64 for loss_E in losses)
    assert all(bool((loss_E > 0).all()) for loss_E in losses)


def test_the_loss_is_a_sum_of_norms_over_batches() -> None:
    view, (first, second, third) = view_moe(FAMILIES["qwen2_moe"]()), corpus()
    together = reconstruction_losses(view, [first, second, third])
    parts = [reconstruction_losses(view, [batch]) for batch in (first, second, third)]
    for layer, loss_E in enumerate(together):
        torch.testing.assert_close(loss_E, sum(part[layer] for part in parts))


@pytest.mark.parametrize("family", SOME)
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = FAMILIES[family]()
    with torch.no_grad():
        before = model(**batch_of(model)).logits
    reconstruction_losses(view_moe(model), corpus(1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**batch_of(model)).logits, before)


def test_hooks_go_after_an_error_too() -> None:
    model = FAMILIES["qwen2_moe"]()
    with pytest.raises(IndexError):
        reconstruction_losses(view_moe(model), [torch.tensor([[VOCABULARY]])])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_moe_16b"])
def test_permuting_experts_permutes_the_losses(family: str) -> None:
    view, order = view_moe(FAMILIES[family]()), [3, 0, 7, 1, 6, 2, 5, 4]
    permuted = view_moe(copy.deepcopy(view.model))
    for name in view.names():
        moved = re.sub(
            r"\.(experts|router|router_bias)\.(\d+)",
            lambda found: f".{found[1]}.{order[int(found[2])]}",
            name,
        )
        permuted.write(name, view.read(moved))
    for before, after in zip(
        reconstruction_losses(view, corpus()),
        reconstruction_losses(permuted, corpus()),
        strict=True,
    ):
        torch.testing.assert_close(after, before[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", SOME)
def test_other_data_chooses_other_experts(family: str) -> None:
    view = view_moe(FAMILIES[family]())
    choices = {
        choose_by_reconstruction(reconstruction_losses(view, [torch.full((1, 4), token)]))
        for token in range(3, 15)
    }
    assert len(choices) > 1


def test_adapters_count_where_they_are_in_effect_and_not_where_they_are_not() -> None:
    expected = reconstruction_losses(view_moe(FAMILIES["qwen2_moe"]()), corpus(1))
    model = adapt("qwen2_moe")
    stir(model)
    adapted = reconstruction_losses(model.view, corpus(1))
    with model.without_adapters():
        found = reconstruction_losses(model.view, corpus(1))
    assert all(map(torch.equal, found, expected))
    assert not any(map(torch.equal, adapted, expected))


def test_the_smallest_loss_is_chosen_and_of_equals_the_first() -> None:
    losses = [[3.0, 1.0, 2.0], [5.0, 4.0, 4.0], [7.0, 7.0, 7.0]]
    tensors = [torch.tensor(row, dtype=torch.float64) for row in losses]
    assert choose_by_reconstruction(tensors) == (1, 1, 0)


def test_equal_experts_choose_the_first() -> None:
    view = view_moe(FAMILIES["mixtral"]())
    for name in view.names():
        if ".experts." in name:
            view.write(name, view.read(re.sub(r"experts\.\d+", "experts.0", name)).clone())
    assert choose_by_reconstruction(reconstruction_losses(view, corpus(1))) == (0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(bad: float) -> None:
    losses = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad])]
    with pytest.raises(ValueError, match=r"^reconstruction losses must be finite, .* MoE layer 1;"):
        choose_by_reconstruction(losses)


def test_a_broken_model_is_an_error() -> None:
    view = view_moe(FAMILIES["qwen2_moe"]())
    view.write("layers.1.experts.5.down_proj", torch.full((WIDTH, 12), torch.nan))
    with pytest.raises(ValueError, match=r"got NaN or infinity in MoE layer 1"):
        choose_by_reconstruction(reconstruction_losses(view, corpus(1)))


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^calibration must have at least one batch, got none; "):
        reconstruction_losses(view_moe(FAMILIES["qwen2_moe"]()), [])


@pytest.mark.parametrize("num_experts", [1, 3])
def test_random_choices_are_in_range_reproducible_and_cover_all(num_experts: int) -> None:
    view = view_moe(FAMILIES["qwen2_moe"]())
    generator = np.random.default_rng(0)
    drawn = [choose_at_random(view, generator, num_experts=num_experts) for _ in range(200)]
    assert all(len(choice) == len(view.layers) for choice in drawn)
    layers = [layer for choice in drawn for layer in choice]
    assert all(list(own) == sorted(set(own)) and len(own) == num_experts for own in layers)
    assert {expert for own in layers for expert in own} == set(range(EXPERTS))
    again = choose_at_random(view, np.random.default_rng(0), num_experts=num_experts)
    assert drawn[0] == again


def test_batches_hold_every_block_once_and_in_order() -> None:
    blocks = [[i, i + 1] for i in range(5)]
    batches = list(batch_blocks(blocks, batch_size=2, device=torch.device("cpu")))
    assert [batch.tolist() for batch in batches] == [blocks[:2], blocks[2:4], blocks[4:]]
    assert all(batch.dtype == torch.int64 for batch in batches)
