"""Adapters as names: fresh ones change nothing, and the base never changes."""

from __future__ import annotations

import re

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper

from orchard import trees
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.slots import Slot, canonical, whole
from orchard.models.trainable.targets import find_targets
from orchard.models.view.detection import view_moe
from tiny_adapted import adapt, stir, targets_of
from tiny_models import EXPERTS, FAMILIES, batch_of

SOME = [
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "aria",
    "nemotron_h",
    "deepseek_moe_16b",
]
FUSED = [family for family in SOME if family != "deepseek_moe_16b"]
EXTRA = [(), ("experts",), ("router", "experts")]


@torch.no_grad()
def logits_of(model: AdaptedModel) -> torch.Tensor:
    return model.model(**batch_of(model.model)).logits


@pytest.mark.parametrize("extra", EXTRA, ids="-".join)
@pytest.mark.parametrize("family", SOME)
def test_a_fresh_adapter_changes_no_bit(family: str, extra: tuple[str, ...]) -> None:
    base = FAMILIES[family]()
    with torch.no_grad():
        expected = base(**batch_of(base)).logits
    assert torch.equal(logits_of(adapt(family, extra=extra)), expected)


@pytest.mark.parametrize("extra", EXTRA, ids="-".join)
@pytest.mark.parametrize("family", SOME)
def test_without_adapters_it_is_the_base_bit_for_bit(family: str, extra: tuple[str, ...]) -> None:
    base = FAMILIES[family]()
    with torch.no_grad():
        expected = base(**batch_of(base)).logits
    model = adapt(family, extra=extra)
    stir(model)
    stirred = logits_of(model)
    assert not torch.allclose(stirred, expected, atol=1e-3)
    with model.without_adapters():
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model), stirred)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_adapters_return_after_an_error_without_them() -> None:
    model = adapt()
    stir(model)
    stirred = logits_of(model)
    with pytest.raises(KeyboardInterrupt), model.without_adapters():
        raise KeyboardInterrupt
    assert torch.equal(logits_of(model), stirred)


@pytest.mark.parametrize("extra", EXTRA, ids="-".join)
@pytest.mark.parametrize("family", SOME)
def test_the_base_state_is_the_base_before_and_after(family: str, extra: tuple[str, ...]) -> None:
    model = adapt(family, extra=extra)
    assert trees.digest(model.base_state) == model.base_digest
    optimizer = torch.optim.SGD(model.set_trainable(model.adapter_names), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.model(**batch_of(model.model)).logits.square().mean().backward()
        optimizer.step()
    assert trees.digest(model.base_state) == model.base_digest
    assert trees.digest(model.read(model.adapter_names)) != trees.digest(model.fresh)
    with torch.no_grad():
        next(iter(model.base_state.values())).add_(1)
    assert trees.digest(model.base_state) != model.base_digest


@pytest.mark.parametrize("extra", EXTRA, ids="-".join)
@pytest.mark.parametrize("family", SOME)
def test_only_what_is_named_requires_gradients(family: str, extra: tuple[str, ...]) -> None:
    model = adapt(family, extra=extra)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    names = [name for name in model.adapter_names if ".lora_B" in name]
    chosen = {id(parameter) for parameter in model.set_trainable(names)}
    for path, parameter in model.model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in chosen) == (".lora_B" in path), path
    model.set_trainable(())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_a_fused_parameter_is_returned_once() -> None:
    model = adapt(targets=("experts",))
    assert len(model.adapter_names) == 2 * 2 * 2 * EXPERTS
    assert len(model.set_trainable(model.adapter_names)) == 2 * 2 * 2


@pytest.mark.parametrize("family", SOME)
def test_what_is_loaded_is_read_back(family: str) -> None:
    model = adapt(family, extra=("router", "experts"))
    generator = torch.Generator().manual_seed(0)
    tree = {n: torch.randn(t.shape, generator=generator) for n, t in model.fresh.items()}
    model.load(tree)
    assert trees.equal(model.read(model.adapter_names), tree)
    first, *_, last = model.adapter_names
    model.load({last: torch.zeros_like(tree[last])})
    assert torch.equal(model.read([first])[first], tree[first])
    assert not model.read([last])[last].any()


def test_what_is_read_is_a_copy() -> None:
    model = adapt(extra=("experts",))
    read = model.read(model.adapter_names)
    for tensor in read.values():
        tensor.fill_(7)
    assert trees.equal(model.read(model.adapter_names), model.fresh)


def test_names_are_the_documented_ones() -> None:
    names = adapt(extra=("router", "experts")).adapter_names
    assert "layers.1.self_attn.q_proj.lora_A" in names
    assert "layers.0.router.5.lora_B" in names
    assert "layers.1.experts.7.down_proj.lora_B" in names
    assert "layers.1.experts.0.gate_up_proj.lora_A" in names
    # 2 layers; A and B of q, v and 2 projections of 8 experts; a router has one A, and B by rows
    assert len(names) == 2 * ((2 + 2 * EXPERTS) * 2 + 1 + EXPERTS)


def test_names_of_listed_experts_are_like_those_of_fused_ones() -> None:
    names = adapt("deepseek_moe_16b", extra=("experts",)).adapter_names
    assert "layers.1.experts.7.down_proj.lora_B" in names


def test_a_linear_router_that_returns_a_tuple_can_be_adapted() -> None:
    assert logits_of(adapt("phimoe", extra=("router",))).isfinite().all()


def test_names_do_not_depend_on_wrapping() -> None:
    assert canonical("model.layers.3.self_attn.q_proj.lora_A.default.weight") == (
        "layers.3.self_attn.q_proj.lora_A"
    )
    assert canonical("model.layers.3.mlp.experts.base_layer.lora_B.default") == (
        "layers.3.mlp.experts.lora_B"
    )


@pytest.mark.parametrize("family", FUSED)
def test_a_name_of_an_expert_is_that_experts_part_of_the_delta(family: str) -> None:
    model = adapt(family, targets=("experts",))
    stir(model)
    by_path = {layer.path: layer for layer in model.view.layers}
    wrappers = [
        (path, module)
        for path, module in model.model.named_modules()
        if isinstance(module, ParamWrapper)
    ]
    assert len(wrappers) == 2 * len(by_path)
    for path, wrapper in wrappers:
        layer = next(by_path[block] for block in by_path if path.startswith(f"{block}."))
        delta_E = wrapper.get_delta_weight("default")
        # PEFT lays A (E * R, in) with the expert slowest, and B (out, R * E) with it fastest.
        A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        for expert in range(EXPERTS):
            prefix = f"{layer.name}.experts.{expert}.{wrapper.parameter_name}"
            own_A, own_B = model.parameters([f"{prefix}.lora_A", f"{prefix}.lora_B"]).values()
            assert torch.equal(own_A, A[2 * expert : 2 * expert + 2])
            assert torch.equal(own_B, B[:, expert::EXPERTS])
            expected = 4.0 / 2 * own_B @ own_A
            if layer.storage.is_transposed:  # type: ignore[attr-defined]
                expected = expected.t()
            torch.testing.assert_close(delta_E[expert], expected)


@pytest.mark.parametrize("family", FUSED)
def test_merging_all_experts_by_name_is_the_adapted_model(family: str) -> None:
    model = adapt(family, targets=("experts",))
    stir(model)
    adapted = logits_of(model)
    with torch.no_grad():
        for layer in model.view.layers:
            for name in ("gate_up_proj", "up_proj", "down_proj"):
                if f"{layer.name}.experts.0.{name}.lora_A" not in model.adapter_names:
                    continue
                for expert in range(EXPERTS):
                    prefix = f"{layer.name}.experts.{expert}.{name}"
                    A, B = model.parameters([f"{prefix}.lora_A", f"{prefix}.lora_B"]).values()
                    weight = getattr(layer.experts, name)[expert]
                    is_transposed = layer.storage.is_transposed  # type: ignore[attr-defined]
                    weight.add_(2.0 * (B @ A).t() if is_transposed else 2.0 * B @ A)
    with model.without_adapters():
        torch.testing.assert_close(logits_of(model), adapted, rtol=1e-4, atol=1e-4)


def test_an_experts_adapter_touches_no_other_expert() -> None:
    model = adapt("gpt_oss", targets=("experts",))
    name = "layers.0.experts.3.down_proj.lora_B"
    model.load({name: torch.ones_like(model.fresh[name])})
    (wrapper,) = (
        module
        for path, module in model.model.named_modules()
        if isinstance(module, ParamWrapper)
        and module.parameter_name == "down_proj"
        and ".layers.0." in f".{path}."
    )
    changed_E = wrapper.get_delta_weight("default").abs().sum(dim=(1, 2)) > 0
    assert changed_E.nonzero().flatten().tolist() == [3]


def test_gradients_have_the_shapes_of_their_names_and_zeros_where_there_is_none() -> None:
    model = adapt(extra=("experts",))
    stir(model)
    model.set_trainable([name for name in model.adapter_names if "experts" in name])
    model.model(**batch_of(model.model)).logits.square().mean().backward()
    gradients = model.gradients(model.adapter_names)
    assert {n: g.shape for n, g in gradients.items()} == {
        n: t.shape for n, t in model.fresh.items()
    }
    assert not any(gradients[n].any() for n in gradients if "self_attn" in n)
    live = model.parameters(["layers.0.experts.1.down_proj.lora_A"])
    (parameter,) = (
        p for p in model.model.parameters() if p.data_ptr() == _base_of(live).data_ptr()
    )
    assert parameter.grad is not None
    rows = parameter.grad.view(EXPERTS, 2, -1)
    torch.testing.assert_close(rows[1], gradients["layers.0.experts.1.down_proj.lora_A"])


def _base_of(live: dict[str, torch.Tensor]) -> torch.Tensor:
    (tensor,) = live.values()
    assert tensor._base is not None
    return tensor._base


def test_an_unknown_target_names_those_that_exist() -> None:
    message = (
        "model.lora_targets must name linear layers of the model, got c_attn; "
        "this model has k_proj, o_proj, q_proj, v_proj, router and experts"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        adapt(targets=("q_proj", "c_attn"))


@pytest.mark.parametrize("target", ["down_proj", "up_proj"])
def test_linear_layers_inside_moe_blocks_are_no_targets(target: str) -> None:
    # deepseek_v3 has a dense first layer, whose MLP is one, and shared experts, which are not.
    names = adapt("deepseek_v3", targets=(target,)).adapter_names
    assert names == (f"layers.0.mlp.{target}.lora_A", f"layers.0.mlp.{target}.lora_B")


@pytest.mark.parametrize("extra", EXTRA, ids="-".join)
@pytest.mark.parametrize("family", SOME)
def test_adapters_are_where_the_targets_are_found(family: str, extra: tuple[str, ...]) -> None:
    found = find_targets(view_moe(FAMILIES[family]()), (*targets_of(family), *extra))
    model = adapt(family, extra=extra)
    factors = [path for path, _ in model.model.named_parameters() if ".lora_A." in path]
    assert len(factors) == len(found[0]) + len(found[1])
    for path in found[0]:
        assert f"{path}.lora_A.default.weight" in factors


@pytest.mark.parametrize("extra", ["experts", "router"])
def test_dropout_where_peft_has_none_is_an_error(extra: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.lora_dropout must be 0 with router or experts"):
        adapt(extra=(extra,), dropout=0.05)


def test_an_unknown_name_or_another_shape_is_an_error() -> None:
    model = adapt()
    with pytest.raises(ValueError, match=r"^stray must be a trainable tensor of this model"):
        model.load({"stray": torch.ones(1)})
    name = model.adapter_names[0]
    with pytest.raises(ValueError, match=rf"^{name} must have shape \(2, 16\), got \(4, 16\); "):
        model.load({name: torch.ones(4, 16)})


@pytest.mark.parametrize("extra", EXTRA, ids="-".join)
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_adapters_are_float32_over_a_bfloat16_base(family: str, extra: tuple[str, ...]) -> None:
    model = adapt(family, extra=extra, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.fresh.values()} == {torch.float32}
    assert trees.digest(model.base_state) == model.base_digest
    with torch.no_grad():
        plain = FAMILIES[family]().to(torch.bfloat16)
        expected = plain(**batch_of(plain)).logits
    assert torch.equal(logits_of(model), expected)
    stir(model)
    assert not torch.equal(logits_of(model), expected)
    assert logits_of(model).dtype == torch.bfloat16


def test_the_seed_decides_the_fresh_values_and_global_randomness_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = (adapt(seed=seed).fresh for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert trees.equal(first, second)
    for name in first:
        assert torch.equal(first[name], other[name]) == name.endswith(".lora_B"), name
        assert not first[name].any() or name.endswith(".lora_A")


def test_a_context_extends_the_names() -> None:
    model = adapt()
    own = torch.nn.Parameter(torch.ones(3))
    with model.extended({"layers.0.graft.own": Slot(own, whole)}):
        model.load({"layers.0.graft.own": torch.zeros(3)})
        assert model.set_trainable(["layers.0.graft.own"]) == [own]
    assert not own.any()
    assert "layers.0.graft.own" not in model.adapter_names
    with pytest.raises(ValueError, match="must be a trainable tensor of this model"):
        model.load({"layers.0.graft.own": torch.zeros(3)})
