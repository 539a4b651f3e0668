"""Several grafts in one layer: their router mixes them, one gate opens for them, all train."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from federations import short_first
from orchard import trees
from orchard.experiment.budgets import graft_elements
from orchard.experts.grafting import Origin, grafted
from orchard.models.stored.streaming import checkpoint_reader, router_reader
from orchard.models.stored.submodel import load_submodel
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.models.view.detection import view_moe
from tiny_adapted import NumberTokenizer, adapt, stir, targets_of
from tiny_checkpoints import LISTED, load_whole, save
from tiny_grafts import (
    CHOICE,
    CLOSED,
    KINDS,
    LORA,
    SOME,
    alone,
    first,
    logits_of,
    plain,
    stir_grafts,
    watch,
)
from tiny_models import FAMILIES, batch_of

SEVERAL = ((1, 3, 6), (5,))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_moe_16b"])
@pytest.mark.parametrize("gate", ["router_row", "closed", "none"])
def test_several_grafts_start_as_the_router_would_mix_them_alone(gate: str, family: str) -> None:
    model = adapt(family)
    settings = replace(LORA, gate=gate)
    with (
        grafted(model, (SEVERAL[0],) * 2, settings, seed=0),
        torch.no_grad(),
        watch(model) as seen,
    ):
        model.model(**batch_of(model.model))
        for layer, x_BSD, output in seen:
            rows = layer.router_tensors()
            z_BSG = x_BSD @ rows["weight"][list(SEVERAL[0])].T
            if "bias" in rows:
                z_BSG = z_BSG + rows["bias"][list(SEVERAL[0])]
            own = [alone(layer, expert, x_BSD) for expert in SEVERAL[0]]
            mixed = sum(
                w[..., None] * y for w, y in zip(z_BSG.softmax(-1).unbind(-1), own, strict=True)
            )
            total_BS1 = z_BSG.exp().sum(-1, keepdim=True)
            opening = {"router_row": total_BS1 / (1 + total_BS1), "closed": 1 / (1 + math.exp(4))}
            expected = first(plain(layer, x_BSD)) + opening.get(gate, 1.0) * mixed
            torch.testing.assert_close(first(output), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", ["additive", "convex", "difference"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_shut_grafts_are_the_base_and_detach(kind: str, mix: str) -> None:
    model = adapt()
    stir(model)
    expected, modules = logits_of(model), [path for path, _ in model.model.named_modules()]
    settings = replace(CLOSED, kind=kind, mix=mix)
    with grafted(model, SEVERAL, settings, seed=0) as grafts:
        stir_grafts(model, grafts)
        assert not torch.equal(logits_of(model), expected)
        shut = [name for name in grafts.names if name.endswith("graft.gate.bias")]
        model.load({name: torch.tensor([-math.inf]) for name in shut})
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model), expected)
    assert [path for path, _ in model.model.named_modules()] == modules
    assert trees.digest(model.base_state) == model.base_digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SOME)
def test_several_grafts_and_their_router_train(family: str, kind: str) -> None:
    model = adapt(family)
    with grafted(model, SEVERAL, replace(CLOSED, kind=kind), seed=0) as grafts:
        several, one = (f"{layer.name}.graft" for layer in model.view.layers)
        own = {"router.weight", "gate.weight", "gate.bias"}
        assert {f"{several}.{name}" for name in own} <= set(grafts.names)
        assert any(name.startswith(f"{several}.2.down_proj.") for name in grafts.names)
        assert not any(name.startswith((f"{one}.router", f"{one}.0")) for name in grafts.names)
        stir_grafts(model, grafts, size=0.1)
        before = model.read(grafts.names)
        optimizer = torch.optim.SGD(model.set_trainable(grafts.names), lr=0.1)
        model.model(**batch_of(model.model)).logits.square().mean().backward()
        assert all(bool(gradient.any()) for gradient in model.gradients(grafts.names).values())
        optimizer.step()
        after = model.read(grafts.names)
        assert all(not torch.equal(before[name], after[name]) for name in grafts.names)
        assert trees.digest(model.base_state) == model.base_digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["router_row", "closed", "none"])
def test_a_list_of_one_graft_is_that_graft(gate: str, kind: str) -> None:
    model, found = adapt(), []
    for choice in (CHOICE, [[expert] for expert in CHOICE]):
        with grafted(model, choice, replace(LORA, gate=gate, kind=kind), seed=3) as grafts:
            found.append((model.read(grafts.names), logits_of(model)))
    assert trees.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_several_grafts_over_bfloat16_are_float32_and_keep_its_dtype() -> None:
    model = adapt(dtype=torch.bfloat16)
    with grafted(model, SEVERAL, LORA, seed=0) as grafts, torch.no_grad(), watch(model) as seen:
        assert {tensor.dtype for tensor in model.read(grafts.names).values()} == {torch.float32}
        model.model(**batch_of(model.model))
        assert {first(output).dtype for _, _, output in seen} == {torch.bfloat16}
        assert all(0 < openness < 1 for openness in grafts.mean_openness())


GATES = ["router_row", "closed", "none"]


# In a short run each family meets one of each, and every pair of the rest is met.
@pytest.mark.parametrize(
    ("family", "gate", "kind", "number"),
    short_first(
        [
            (family, GATES[i % 3], [*KINDS][i % len(KINDS)], 1 + (i // 2) % 2)
            for i, family in enumerate([*SOME, *SOME])
        ],
        itertools.product(SOME, GATES, KINDS, [1, 2]),
    ),
)
def test_their_elements_are_those_that_a_plan_counts(
    family: str, gate: str, kind: str, number: int
) -> None:
    model, settings = adapt(family), replace(LORA, gate=gate, kind=kind)
    chosen = tuple(range(1, 1 + number))
    with grafted(model, [chosen] * 2, settings, seed=0) as grafts:
        own = model.read(grafts.names)
        for layer in model.view.layers:
            actual = sum(t.numel() for name, t in own.items() if name.startswith(f"{layer.name}."))
            assert graft_elements(layer, settings, number=number) == actual


# What they start as


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in LISTED])
def test_rows_of_a_router_are_read_as_they_are_loaded(family: str, tmp_path: Path) -> None:
    path = save(family, tmp_path)
    read = router_reader(path)
    for index, layer in enumerate(view_moe(load_whole(path)).layers):
        rows = layer.router_tensors()
        own = read(index, 3)
        assert own.keys() == rows.keys() & {"weight", "bias"}
        assert all(torch.equal(own[local], rows[local][3]) for local in own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_experts_that_are_not_held_are_read(family: str, kind: str, tmp_path: Path) -> None:
    path = save(family, tmp_path)
    lora = LoraSettings(rank=2, alpha=4.0, dropout=0.0, targets=targets_of(family))
    models = [
        AdaptedModel(view, lora, tokenizer=NumberTokenizer(), base_digest="", seed=0)
        for view in (
            view_moe(load_whole(path)),
            load_submodel(path, [[0, 3, 4], [1, 2]], dtype="float32", device="cpu"),
        )
    ]
    read_expert, read_row = checkpoint_reader(path, "float32"), router_reader(path)
    seen = []

    def read(layer: int, expert: int) -> Origin:
        seen.append((layer, expert))
        row = read_row(layer, expert)
        return Origin(read_expert(layer, expert), row["weight"], row.get("bias"))

    found = []
    for model in models:
        with grafted(model, SEVERAL, replace(LORA, kind=kind), seed=0, read=read) as grafts:
            values = {
                f"{layer.name}.{name}": value.detach().clone()
                for layer in model.view.layers
                for name, value in layer.block.get_submodule("graft").named_parameters()
            }
            assert any(".router." in name for name in grafts.names)
            found.append(values)
    assert seen == [(0, 1), (0, 6), (1, 5)]
    assert trees.equal(found[0], found[1])


def test_beside_trained_routers_and_experts_they_start_as_in_the_base() -> None:
    base = view_moe(FAMILIES["gpt_oss"]())
    lora = LoraSettings(
        rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",), full=("experts", "router")
    )
    view = view_moe(FAMILIES["gpt_oss"]())
    model = AdaptedModel(view, lora, tokenizer=NumberTokenizer(), base_digest="", seed=0)
    stir(model)
    with grafted(model, SEVERAL, LORA, seed=0):
        for layer, own, chosen in zip(view.layers, base.layers, SEVERAL, strict=True):
            graft = layer.block.get_submodule("graft")
            rows = own.router_tensors()
            assert not torch.equal(rows["weight"], layer.router_tensors()["weight"])
            if len(chosen) == 1:
                continue
            router = graft.get_parameter("router.weight"), graft.get_parameter("router.bias")
            assert torch.equal(router[0], rows["weight"][list(chosen)])
            assert torch.equal(router[1], rows["bias"][list(chosen)])
            for position, expert in enumerate(chosen):
                weight = graft.get_parameter(f"{position}.down_proj.base_layer.weight")
                assert torch.equal(weight, own.expert_tensors(expert)["down_proj"])
