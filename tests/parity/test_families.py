"""Every family behaves the same behind the view."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchard.models.view.detection import view_moe
from orchard.models.view.moe import MoELayer, MoEView
from orchard.models.view.routing import record_routing
from tiny_models import EXPERT_WIDTH, EXPERTS, FAMILIES, WIDTH, batch_of

TOP_1 = {"switch"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def view(family: str) -> MoEView:
    return view_moe(FAMILIES[family]())


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3))


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch_of(model)).logits


def combine(layer: MoELayer, x_TD: Tensor, choices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for expert in range(layer.num_experts):
        weight_T1 = (weights_TK * (choices_TK == expert)).sum(dim=-1, keepdim=True)
        y_TD = y_TD + weight_T1 * layer.run_expert(expert, x_TD)
    return y_TD


def seen_by(layer: MoELayer, module: nn.Module, x_TD: Tensor) -> tuple[tuple, object]:
    """Run the block; return the inputs and the output of one of its modules."""
    seen = []
    hook = module.register_forward_hook(lambda _, args, output: seen.append((args, output)))
    layer.block(x_TD[None])
    hook.remove()
    ((args, output),) = seen
    return args, output


def choices_and_weights(output: tuple) -> tuple[Tensor, Tensor]:
    """Read a router by the order its family documents."""
    first, second, third = output
    if third is None:  # DeepSeek-MoE-16B: choices, weights, no auxiliary loss
        return first, second
    if not second.is_floating_point():  # Switch before transformers 5.22: no logits
        return second.argmax(-1).view(-1, 1), third.view(-1, 1)
    if not first.is_floating_point() and first.shape == second.shape:
        return first, second  # GraniteMoe of transformers 5.17: choices, weights, logits
    if not first.is_floating_point():  # Switch: one-hot choices, weight, logits
        return first.argmax(-1).view(-1, 1), second.view(-1, 1)
    return third, second  # the fused interface: logits, weights, choices


def test_layers_report_the_sizes_of_the_model(family: str, view: MoEView) -> None:
    assert len(view.layers) == 2
    for layer in view.layers:
        assert layer.num_experts == EXPERTS
        assert layer.top_k == (1 if family in TOP_1 else 2)
        assert (layer.width, layer.expert_width) == (WIDTH, EXPERT_WIDTH)
        assert view.model.get_submodule(layer.path) is layer.block
        assert layer.router_tensors()["weight"].shape == (EXPERTS, WIDTH)
        shapes = {k: tuple(t.shape) for k, t in layer.expert_tensors(EXPERTS - 1).items()}
        assert shapes["up_proj"] == (EXPERT_WIDTH, WIDTH)
        assert shapes["down_proj"] == (WIDTH, EXPERT_WIDTH)
        assert ("gate_proj" in shapes) == (family not in {"switch", "nemotron_h"})
        assert ("gate_proj_bias" in shapes) == (family == "gpt_oss")


def test_names_to_tensors_to_names_is_bit_identical(view: MoEView) -> None:
    state = {name: value.clone() for name, value in view.model.state_dict().items()}
    values = {name: view.read(name).clone() for name in view.names()}
    for name in view.names():
        view.read(name).zero_()
    ids = view.routed_parameters()
    for name, parameter in view.model.named_parameters():
        assert name not in ids or not parameter.any(), "the names must cover every expert value"
    for name, value in values.items():
        view.write(name, value)
    after = view.model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_names_neither_overlap_nor_repeat(view: MoEView) -> None:
    names = view.names()
    assert len(set(names)) == len(names)
    for number, name in enumerate(names):
        view.read(name).fill_(float(number))
    assert all((view.read(name) == number).all() for number, name in enumerate(names))


def test_reads_alias_the_parameters(view: MoEView) -> None:
    held = {**dict(view.model.named_parameters()), **dict(view.model.named_buffers())}
    storages = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    before = logits_of(view.model)
    for layer in view.layers:
        for expert in range(layer.num_experts):
            down = view.read(f"{layer.name}.experts.{expert}.down_proj")
            assert down.untyped_storage().data_ptr() in storages
            assert not down.requires_grad
            down.mul_(-1.0)
        assert layer.router_tensors()["weight"].untyped_storage().data_ptr() in storages
    assert not torch.allclose(before, logits_of(view.model))


def test_a_write_to_one_expert_leaves_the_others(view: MoEView, x_TD: Tensor) -> None:
    layer = view.layers[1]
    before = [layer.run_expert(expert, x_TD) for expert in range(EXPERTS)]
    for local in layer.expert_tensors(2):
        name = f"{layer.name}.experts.2.{local}"
        view.write(name, view.read(name) + 1.0)
    for expert in range(EXPERTS):
        same = torch.equal(before[expert], layer.run_expert(expert, x_TD))
        assert same == (expert != 2)


def test_experts_combined_by_the_router_equal_the_routed_output(
    view: MoEView, x_TD: Tensor
) -> None:
    for layer in view.layers:
        _, output = seen_by(layer, layer.router, x_TD)
        choices_TK, weights_TK = choices_and_weights(output)
        y_TD = layer.routed_output(x_TD)
        assert y_TD.abs().mean() > 1e-3
        expected = combine(layer, x_TD, choices_TK, weights_TK)
        torch.testing.assert_close(y_TD, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(layer.route(x_TD), (choices_TK, weights_TK), check_dtype=False)


def test_routed_output_is_what_the_model_computes(view: MoEView, x_TD: Tensor) -> None:
    for layer in view.layers:
        if layer.is_fused:
            _, expected = seen_by(layer, layer.experts, x_TD)
            torch.testing.assert_close(layer.routed_output(x_TD), expected, atol=0, rtol=0)
        else:
            expected = layer.block(x_TD[None])[0]
            for shared in layer.shared_experts:
                expected = expected - shared(x_TD)
            torch.testing.assert_close(layer.routed_output(x_TD), expected, atol=2e-5, rtol=1e-4)


def test_projections_and_activation_rebuild_the_expert(view: MoEView, x_TD: Tensor) -> None:
    layer = view.layers[0]
    tensors = layer.expert_tensors(3)

    def project(x: Tensor, local: str) -> Tensor:
        return functional.linear(x, tensors[local], tensors.get(f"{local}_bias"))

    gate_TF = project(x_TD, "gate_proj") if "gate_proj" in tensors else None
    hidden_TF = layer.activate(gate_TF, project(x_TD, "up_proj"))
    rebuilt = project(hidden_TF, "down_proj")
    torch.testing.assert_close(rebuilt, layer.run_expert(3, x_TD), atol=2e-5, rtol=1e-4)


def test_run_expert_is_differentiable(view: MoEView, x_TD: Tensor) -> None:
    layer = view.layers[0]
    x_TD.requires_grad_()
    layer.run_expert(1, x_TD).square().sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.abs().sum() > 0
    x_TD.grad = None
    layer.routed_output(x_TD).square().sum().backward()
    assert x_TD.grad.abs().sum() > 0


def test_viewing_changes_nothing(family: str) -> None:
    model = FAMILIES[family]()
    before = logits_of(model)
    draw = torch.random.get_rng_state()
    view = view_moe(model)
    with record_routing(view):
        during = logits_of(model)
    assert torch.equal(before, during)
    assert torch.equal(before, logits_of(model))
    assert torch.equal(draw, torch.random.get_rng_state())


def hooks_of(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        yield len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_record_matches_the_router(view: MoEView) -> None:
    calls: dict[str, tuple[Tensor, tuple]] = {}
    for layer in view.layers:
        layer.router.register_forward_hook(
            lambda _, args, output, name=layer.name: calls.update({name: (args[0], output)})
        )
    hooks = list(hooks_of(view.model))
    with record_routing(view) as record:
        logits_of(view.model)
    assert list(hooks_of(view.model)) == hooks
    for layer, entry in zip(view.layers, record.layers, strict=True):
        x, output = calls[layer.name]
        tensors = layer.router_tensors()
        logits_TE = functional.linear(x.reshape(-1, WIDTH), tensors["weight"], tensors.get("bias"))
        torch.testing.assert_close(entry.probabilities_TE, logits_TE.softmax(dim=-1))
        choices_TK, weights_TK = choices_and_weights(output)
        assert torch.equal(entry.choices_TK, choices_TK)
        assert torch.equal(entry.weights_TK, weights_TK)
        assert entry.token_mask_T.all()
        assert not entry.weights_TK.requires_grad
        assert entry.expert_counts().sum() == entry.choices_TK.numel()


def test_record_excludes_padding(view: MoEView) -> None:
    model = view.model
    batch = batch_of(model, num_padding=3)
    with record_routing(view, token_mask_BS=batch["attention_mask"]) as record:
        model(**batch)
    layer, entry = view.layers[0], record.layers[0]
    assert entry.token_mask_T.tolist() == [True] * 11 + [False] * 3
    expected = entry.choices_TK[:11].flatten().bincount(minlength=EXPERTS)
    assert torch.equal(record.expert_counts(0), expected)
    assert record.expert_counts(0).sum() == 11 * layer.top_k


def test_parameter_names_belong_to_experts_and_routers(view: MoEView) -> None:
    routed, routers = view.routed_parameters(), view.router_parameters()
    named = dict(view.model.named_parameters())
    assert routed <= named.keys()
    assert routers <= named.keys()
    assert not routed & routers
    for layer in view.layers:
        inside = {f"{layer.path}.experts.{name}" for name, _ in layer.experts.named_parameters()}
        assert inside <= routed
        assert any(name.startswith(f"{layer.path}.") for name in routers)
    assert not any("shared" in name or "attn" in name for name in routed | routers)
