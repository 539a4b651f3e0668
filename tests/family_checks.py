"""What every family must pass, from names to whole rounds."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from family_rounds import check_rounds
from orchard.experts.grafting import GraftSettings, grafted
from orchard.experts.masking import detached_experts
from orchard.models.stored.loading import check_checkpoint, load_base, without_progress_bars
from orchard.models.stored.streaming import checkpoint_reader, streamed_experts
from orchard.models.stored.submodel import load_skeleton, load_submodel
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.models.view.detection import view_moe
from tiny_adapted import NumberTokenizer, stir

LORA = LoraSettings(2, 4.0, 0.0, ("attention", "router", "experts"))
IDS_BS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS_BS).logits


def check(model: nn.Module, folder: Path) -> None:
    """Go through names, disk, streaming, carving, adapters, grafts, masks and whole rounds."""
    native = logits_of(model)
    view_moe(model)
    expected = logits_of(model)
    torch.testing.assert_close(expected, native, rtol=1e-5, atol=1e-5)
    check_names(model)
    assert torch.equal(logits_of(model), expected)
    loaded = check_stored(model, expected, str(folder))
    adapted = check_trained(loaded, logits_of(loaded))
    adapted.load(adapted.fresh)
    check_rounds(adapted, LORA, str(folder))


def check_names(model: nn.Module) -> None:
    view = view_moe(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = {name: view.read(name).clone() for name in view.names()}
    for name in view.names():
        view.read(name).zero_()
    routed = view.routed_parameters()
    assert not any(p.any() for name, p in model.named_parameters() if name in routed)
    for name, value in values.items():
        view.write(name, value)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def check_stored(model: nn.Module, expected: Tensor, path: str) -> nn.Module:
    with without_progress_bars():
        model.save_pretrained(path)
    num_layers = len(check_checkpoint(path, LORA).view.layers)
    whole = load_base(path, dtype="float32").view
    torch.testing.assert_close(logits_of(whole.model), expected, rtol=0, atol=1e-4)
    skeleton = load_skeleton(path, dtype="float32")
    with streamed_experts(skeleton, checkpoint_reader(path, "float32")):
        torch.testing.assert_close(logits_of(skeleton.model), expected, rtol=0, atol=1e-4)
    some = load_submodel(path, [[0, 3]] * num_layers, dtype="float32")
    assert all(torch.equal(some.read(name), whole.read(name)) for name in some.names())
    assert logits_of(some.model).isfinite().all()
    return whole.model


def check_trained(model: nn.Module, expected: Tensor) -> AdaptedModel:
    view = view_moe(model)
    adapted = AdaptedModel(view, LORA, tokenizer=NumberTokenizer(), base_digest="", seed=0)
    assert torch.equal(logits_of(model), expected), "a fresh adapter changes nothing"
    stir(adapted, size=0.05)
    stirred = logits_of(model)
    assert not torch.equal(stirred, expected)
    settings = GraftSettings(rank=2, alpha=4.0, dropout=0.0, gate="closed")
    with grafted(adapted, [1] * len(view.layers), settings, seed=0) as grafts:
        assert not torch.equal(logits_of(model), stirred)
        gates = [name for name in grafts.names if name.endswith("graft.gate.bias")]
        assert len(gates) == len(view.layers)
        adapted.load({name: torch.tensor([-math.inf]) for name in gates})
        assert torch.equal(logits_of(model), stirred), "a shut gate is the base"
    learning = tuple(torch.arange(layer.num_experts) < 2 for layer in view.layers)
    with detached_experts(view) as switch:
        switch.learning = learning
        own = [n for n in adapted.adapter_names if ".experts." in n and n.endswith("lora_B")]
        adapted.set_trainable(own)
        logits = model(input_ids=IDS_BS).logits
        torch.testing.assert_close(logits, stirred, rtol=0, atol=1e-4)
        logits.square().mean().backward()
        gradients = adapted.gradients(own)
    moved = {int(n.split(".experts.")[1].split(".")[0]) for n, g in gradients.items() if g.any()}
    assert moved
    assert moved <= {0, 1}, "masked experts get no gradient"
    return adapted
