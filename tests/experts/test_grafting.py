"""Personal experts: shut they are nothing, detached they are gone, and they own what they train."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from orchard import trees
from orchard.experts.grafting import Graft, GraftSettings, Origin, grafted
from tiny_adapted import adapt, stir
from tiny_grafts import (
    CHOICE,
    CLOSED,
    KINDS,
    LORA,
    NO_GATE,
    SOME,
    alone,
    first,
    logits_of,
    plain,
    stir_grafts,
    watch,
)
from tiny_models import EXPERTS, WIDTH, batch_of


@pytest.mark.parametrize("mix", ["additive", "convex"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME)
def test_a_shut_gate_is_the_base_bit_for_bit(family: str, kind: str, mix: str) -> None:
    model = adapt(family)
    stir(model)
    expected = logits_of(model)
    with grafted(model, CHOICE, replace(CLOSED, kind=kind, mix=mix), seed=0) as grafts:
        stir_grafts(model, grafts)
        assert not torch.equal(logits_of(model), expected)
        shut = [name for name in grafts.names if name.endswith("graft.gate.bias")]
        assert len(shut) == 2
        model.load({name: torch.tensor([-math.inf]) for name in shut})
        assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME)
def test_detaching_gives_the_base_back(family: str, kind: str) -> None:
    model = adapt(family)
    stir(model)
    expected, modules = logits_of(model), [path for path, _ in model.model.named_modules()]
    parameters = {path: id(parameter) for path, parameter in model.model.named_parameters()}
    names = set(model._slots)
    with grafted(model, CHOICE, replace(LORA, kind=kind), seed=0) as grafts:
        optimizer = torch.optim.SGD(model.set_trainable(grafts.names), lr=0.1)
        model.model(**batch_of(model.model)).logits.square().mean().backward()
        optimizer.step()
        assert not torch.equal(logits_of(model), expected)
    model.set_trainable(())
    assert torch.equal(logits_of(model), expected)
    assert [path for path, _ in model.model.named_modules()] == modules
    assert {path: id(p) for path, p in model.model.named_parameters()} == parameters
    assert not any(layer.block._forward_hooks for layer in model.view.layers)
    assert set(model._slots) == names
    assert trees.digest(model.base_state) == model.base_digest


def test_an_error_inside_detaches_too() -> None:
    model = adapt()
    expected = logits_of(model)
    with pytest.raises(KeyboardInterrupt), grafted(model, CHOICE, LORA, seed=0):
        raise KeyboardInterrupt
    assert torch.equal(logits_of(model), expected)
    assert not any(hasattr(layer.block, "graft") for layer in model.view.layers)


def test_a_choice_that_does_not_fit_is_an_error_and_leaves_nothing() -> None:
    model = adapt()
    for choice in ((1,), (1, 2, 3), (1, EXPERTS)):
        with (
            pytest.raises((ValueError, IndexError)),
            grafted(model, choice, LORA, seed=0),
        ):
            pass
        assert not any(hasattr(layer.block, "graft") for layer in model.view.layers)
        assert not any(layer.block._forward_hooks for layer in model.view.layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME)
def test_a_fresh_graft_without_gate_adds_its_expert(family: str, kind: str) -> None:
    model = adapt(family)
    with (
        grafted(model, CHOICE, replace(NO_GATE, kind=kind), seed=0) as grafts,
        torch.no_grad(),
        watch(model) as seen,
    ):
        model.model(**batch_of(model.model))
        for (layer, x_BSD, output), expert in zip(seen, CHOICE, strict=True):
            expected = first(plain(layer, x_BSD)) + alone(layer, expert, x_BSD)
            torch.testing.assert_close(first(output), expected, rtol=1e-6, atol=1e-6)
            assert not torch.allclose(first(output), first(plain(layer, x_BSD)), atol=1e-3)
    assert grafts.mean_openness() == (1.0, 1.0)


@pytest.mark.parametrize("family", SOME)
def test_a_lora_graft_aliases_its_expert(family: str) -> None:
    model = adapt(family)
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for tensor in model.base_state.values()
    ]

    def is_inside(tensor: Tensor) -> bool:
        return any(start <= tensor.data_ptr() < end for start, end in spans)

    with grafted(model, CHOICE, LORA, seed=0) as grafts:
        own = {model._slots[name].parameter.data_ptr() for name in grafts.names}
        for graft, layer, expert in zip(grafts.modules, model.view.layers, CHOICE, strict=True):
            tensors = layer.expert_tensors(expert)
            for path, parameter in graft.named_parameters():
                assert (parameter.data_ptr() in own) != is_inside(parameter), path
                if ".base_layer." in path:
                    name = path.replace(".base_layer.weight", "").replace(
                        ".base_layer.bias", "_bias"
                    )
                    assert parameter.data_ptr() == tensors[name].data_ptr()
                    assert parameter.stride() == tensors[name].stride()


def test_a_lora_graft_follows_its_expert() -> None:
    model = adapt()
    with grafted(model, CHOICE, NO_GATE, seed=0) as grafts, torch.no_grad():
        x_BSD = torch.randn(1, 4, WIDTH)
        layer = model.view.layers[0]
        layer.expert_tensors(3)["down_proj"].mul_(2)
        _, y_BSD = grafts.modules[0](x_BSD)
        torch.testing.assert_close(y_BSD, alone(layer, 3, x_BSD))


@pytest.mark.parametrize("family", SOME)
def test_a_dense_graft_trains_its_own_copy(family: str) -> None:
    model = adapt(family)
    with grafted(model, CHOICE, replace(LORA, kind="dense"), seed=0) as grafts:
        for graft, layer, expert in zip(grafts.modules, model.view.layers, CHOICE, strict=True):
            for name, tensor in layer.expert_tensors(expert).items():
                path = (
                    name.replace("_bias", ".bias") if name.endswith("_bias") else f"{name}.weight"
                )
                own = model.read([f"{layer.name}.graft.{path}"])[f"{layer.name}.graft.{path}"]
                assert torch.equal(own, tensor)
                assert graft.get_parameter(path).data_ptr() != tensor.data_ptr()
        before = model.read(grafts.names)
        optimizer = torch.optim.SGD(model.set_trainable(grafts.names), lr=0.1)
        model.model(**batch_of(model.model)).logits.square().mean().backward()
        optimizer.step()
        after = model.read(grafts.names)
        assert all(not torch.equal(before[name], after[name]) for name in grafts.names)
        assert trees.digest(model.base_state) == model.base_digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME)
def test_gradients_reach_grafts_and_gates_alone(family: str, kind: str) -> None:
    model = adapt(family)
    with grafted(model, CHOICE, replace(LORA, kind=kind), seed=0) as grafts:
        stir_grafts(model, grafts, size=0.1)
        chosen = {id(parameter) for parameter in model.set_trainable(grafts.names)}
        model.model(**batch_of(model.model)).logits.square().mean().backward()
        for path, parameter in model.model.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in chosen), path
        gradients = model.gradients(grafts.names)
        assert all(bool(gradient.any()) for gradient in gradients.values())
        # per layer: A and B, or the weights (and biases); and the gate
        kinds = len(model.view.layers[0].expert_tensors(0))
        projections = kinds // 2 if family == "gpt_oss" else kinds
        per_layer = (2 * projections if kind == "lora" else kinds) + 1
        assert len(grafts.names) == 2 * per_layer


@pytest.mark.parametrize("settings", [LORA, CLOSED, NO_GATE, replace(CLOSED, kind="dense")])
def test_names_say_graft_and_layer(settings: GraftSettings) -> None:
    model = adapt()
    with grafted(model, CHOICE, settings, seed=0) as grafts:
        assert all(name.startswith(("layers.0.graft.", "layers.1.graft.")) for name in grafts.names)
        assert not any("default" in name or "base_layer" in name for name in grafts.names)
        assert not set(grafts.names) & set(model.adapter_names)
        has_gate = any("graft.gate." in name for name in grafts.names)
        assert has_gate == (settings.gate != "none")
        if settings == LORA:
            assert "layers.1.graft.down_proj.lora_B" in grafts.names
            assert "layers.0.graft.gate.weight" in grafts.names
    if settings.kind == "dense":
        assert "layers.0.graft.up_proj.weight" in grafts.names


@pytest.mark.parametrize("mix", ["additive", "convex", "difference"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_moe_16b"])
def test_the_mix_is_its_formula(family: str, mix: str) -> None:
    model = adapt(family)
    with grafted(model, CHOICE, replace(CLOSED, mix=mix), seed=0) as grafts:
        stir_grafts(model, grafts)
        tree = model.read(grafts.names)
        with torch.no_grad(), watch(model) as seen:
            model.model(**batch_of(model.model))
        for layer, x_BSD, output in seen:
            prefix = f"{layer.name}.graft"
            score = x_BSD @ tree[f"{prefix}.gate.weight"] + tree[f"{prefix}.gate.bias"]
            s_BS1 = torch.sigmoid(score)[..., None]
            graft = layer.block.get_submodule("graft")
            with torch.no_grad():
                _, y_BSD = graft(x_BSD)
                routed_BSD = first(plain(layer, x_BSD))
            kept = (1 - s_BS1) * routed_BSD if mix == "convex" else routed_BSD
            torch.testing.assert_close(first(output), kept + s_BS1 * y_BSD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["router_row", "closed", "none"])
@pytest.mark.parametrize(("family", "kind"), [*zip(SOME, [*KINDS * 4], strict=False)])
def test_a_fresh_difference_graft_is_the_base_bit_for_bit_however_open(
    family: str, kind: str, gate: str
) -> None:
    model = adapt(family)
    stir(model)
    expected = logits_of(model)
    settings = replace(LORA, kind=kind, gate=gate, mix="difference")
    with grafted(model, CHOICE, settings, seed=0) as grafts:
        assert torch.equal(logits_of(model), expected)
        stir_grafts(model, grafts)
        assert not torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_graft_counts_what_it_has_moved_from_its_expert(kind: str) -> None:
    model = adapt("gpt_oss")
    x_BSD = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    found = {}
    for mix in ("additive", "difference"):
        settings = replace(LORA, kind=kind, mix=mix)
        with grafted(model, CHOICE, settings, seed=0) as grafts, torch.no_grad():
            _, begun_BSD = grafts.modules[0](x_BSD)
            stir_grafts(model, grafts)
            _, found[mix] = grafts.modules[0](x_BSD)
        if mix == "additive":
            expert_BSD = begun_BSD
    moved_BSD = found["additive"] - expert_BSD
    assert float(moved_BSD.abs().max()) > 0.01
    torch.testing.assert_close(found["difference"], moved_BSD, rtol=1e-5, atol=1e-5)


def test_a_lora_graft_is_its_expert_with_merged_weights() -> None:
    model = adapt("qwen2_moe")
    with grafted(model, CHOICE, LORA, seed=0) as grafts, torch.no_grad():
        stir_grafts(model, grafts)
        tree, layer = model.read(grafts.names), model.view.layers[1]
        merged = {
            name: tensor
            + 2.0 * tree[f"layers.1.graft.{name}.lora_B"] @ tree[f"layers.1.graft.{name}.lora_A"]
            for name, tensor in layer.expert_tensors(5).items()
        }
        x_BSD = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
        hidden = nn.functional.silu(x_BSD @ merged["gate_proj"].T) * (x_BSD @ merged["up_proj"].T)
        _, y_BSD = grafts.modules[1](x_BSD)
        torch.testing.assert_close(y_BSD, hidden @ merged["down_proj"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_moe_16b", "granitemoe"])
def test_the_gate_starts_as_the_experts_router_row(family: str) -> None:
    model = adapt(family)
    with grafted(model, CHOICE, LORA, seed=0) as grafts, torch.no_grad(), watch(model) as seen:
        model.model(**batch_of(model.model))
        for (layer, x_BSD, _), graft, expert in zip(seen, grafts.modules, CHOICE, strict=True):
            row_D = layer.router_tensors()["weight"][expert]
            assert "bias" not in graft.gate
            openness_BS1, _ = graft(x_BSD)
            torch.testing.assert_close(openness_BS1[..., 0], torch.sigmoid(x_BSD @ row_D))
            assert graft.gate["weight"].data_ptr() != row_D.data_ptr()


def test_the_gate_is_the_routers_own_logit() -> None:
    model, logits = adapt("qwen2_moe"), []
    with grafted(model, CHOICE, LORA, seed=0) as grafts, torch.no_grad(), watch(model) as seen:
        handle = model.view.layers[0].router.register_forward_hook(
            lambda module, args, output: logits.append(output[0])
        )
        model.model(**batch_of(model.model))
        handle.remove()
        openness_BS1, _ = grafts.modules[0](seen[0][1])
    torch.testing.assert_close(openness_BS1.flatten(), torch.sigmoid(logits[0][:, CHOICE[0]]))


def test_a_closed_gate_starts_almost_shut_for_every_token() -> None:
    model = adapt()
    with grafted(model, CHOICE, CLOSED, seed=0) as grafts:
        logits_of(model)
        expected = 1 / (1 + math.exp(4))
        assert grafts.mean_openness() == pytest.approx((expected, expected), rel=1e-5)


@pytest.mark.parametrize("family", SOME)
def test_mean_openness_is_a_mean_over_tokens_and_batches(family: str) -> None:
    model = adapt(family)
    with grafted(model, CHOICE, LORA, seed=0) as grafts:
        assert grafts.mean_openness() == (0.0, 0.0)
        means = []
        for seed in (1, 2):
            with torch.no_grad(), watch(model) as seen:
                model.model(**batch_of(model.model, seed=seed))
            gates = [graft.gate["weight"].detach() for graft in grafts.modules]
            means.append(
                [
                    float(torch.sigmoid(x_BSD @ gate_D).mean())
                    for (_, x_BSD, _), gate_D in zip(seen, gates, strict=True)
                ]
            )
        found = grafts.mean_openness()
        assert all(0 < openness < 1 for openness in found)
        expected = [sum(layer) / 2 for layer in zip(*means, strict=True)]
        assert found == pytest.approx(expected, rel=1e-4)


def test_the_output_of_gpt_oss_stays_a_tuple() -> None:
    model = adapt("gpt_oss")
    with grafted(model, CHOICE, LORA, seed=0), torch.no_grad(), watch(model) as seen:
        model.model(**batch_of(model.model))
        for layer, x_BSD, output in seen:
            expected = plain(layer, x_BSD)
            assert isinstance(output, tuple)
            assert len(output) == len(expected)
            assert all(map(torch.equal, output[1:], expected[1:]))


def test_the_seed_decides_the_fresh_values_and_global_randomness_is_left_alone() -> None:
    model, state, read = adapt(), torch.get_rng_state(), []
    for seed in (1, 1, 2):
        with grafted(model, CHOICE, LORA, seed=seed) as grafts:
            read.append(model.read(grafts.names))
    assert torch.equal(torch.get_rng_state(), state)
    assert trees.equal(read[0], read[1])
    for name, tensor in read[0].items():
        assert torch.equal(tensor, read[2][name]) == (".lora_A" not in name), name
        assert tensor.any() == (".lora_B" not in name), name


def test_grafts_drop_out_in_training_alone() -> None:
    model = adapt()
    with grafted(model, CHOICE, replace(LORA, dropout=0.5), seed=0) as grafts:
        stir_grafts(model, grafts)
        assert torch.equal(logits_of(model), logits_of(model))
        model.model.train()
        assert not torch.equal(logits_of(model), logits_of(model))
    with grafted(model, CHOICE, LORA, seed=0) as grafts:
        assert all(graft.training for graft in grafts.modules)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME)
def test_grafts_are_float32_over_a_bfloat16_base(family: str, kind: str) -> None:
    model = adapt(family, dtype=torch.bfloat16)
    with grafted(model, CHOICE, replace(LORA, kind=kind), seed=0) as grafts:
        assert {tensor.dtype for tensor in model.read(grafts.names).values()} == {torch.float32}
        with torch.no_grad(), watch(model) as seen:
            model.model(**batch_of(model.model))
        assert {first(output).dtype for _, _, output in seen} == {torch.bfloat16}
        optimizer = torch.optim.SGD(model.set_trainable(grafts.names), lr=0.1)
        model.model(**batch_of(model.model)).logits.float().square().mean().backward()
        optimizer.step()
    assert trees.digest(model.base_state) == model.base_digest


def test_two_clients_take_turns_on_one_base() -> None:
    model = adapt()
    with grafted(model, (0, 1), LORA, seed=0) as grafts:
        stir_grafts(model, grafts)
        kept, expected = model.read(grafts.names), logits_of(model)
    with grafted(model, (4, 2), LORA, seed=1) as grafts:
        stir_grafts(model, grafts)
    with grafted(model, (0, 1), LORA, seed=7):
        model.load(kept)
        assert torch.equal(logits_of(model), expected)


def test_grafts_and_expert_adapters_stand_side_by_side() -> None:
    model = adapt(extra=("experts", "router"))
    stir(model)
    expected = logits_of(model)
    with grafted(model, CHOICE, CLOSED, seed=0) as grafts:
        shut = [name for name in grafts.names if name.endswith(".bias")]
        model.load({name: torch.tensor([-math.inf]) for name in shut})
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model), expected)


def test_a_graft_has_the_norm_behind_its_expert() -> None:
    model = adapt("mixtral")
    layer = model.view.layers[0]
    norm = nn.RMSNorm(WIDTH)
    layer.experts.add_module("post_expert_norm", norm)
    layer.storage.has_post_norm = True  # type: ignore[attr-defined]
    origin = Origin(layer.expert_tensors(3), layer.router_tensors()["weight"][3])
    graft = Graft(layer, origin, NO_GATE)
    x_BSD = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, y_BSD = graft(x_BSD)
        torch.testing.assert_close(y_BSD, alone(layer, 3, x_BSD))


def test_a_fresh_graft_says_nothing_at_first_and_learns() -> None:
    model = adapt()
    expected = logits_of(model)
    settings = replace(LORA, kind="dense", gate="none", is_fresh=True)
    begun = []
    for seed in (0, 0, 1):
        with grafted(model, CHOICE, settings, seed=seed) as grafts:
            assert torch.equal(logits_of(model), expected)
            begun.append(model.read(grafts.names))
            optimizer = torch.optim.SGD(model.set_trainable(grafts.names), lr=0.1)
            model.model(**batch_of(model.model)).logits.square().mean().backward()
            optimizer.step()
            assert not torch.equal(logits_of(model), expected)
            model.set_trainable(())
    name = next(name for name in begun[0] if "up_proj" in name)
    assert torch.equal(begun[0][name], begun[1][name])
    assert not torch.equal(begun[0][name], begun[2][name])
