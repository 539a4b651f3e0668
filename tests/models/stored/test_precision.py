"""Frozen experts in few bits are off by no more than their format says, wherever they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from federations import build, quick_recipe, short_model
from orchard.communication.messages import LocalSettings, Task
from orchard.models.stored.expert_cache import FOLDER
from orchard.models.stored.placing import Placement, open_base
from orchard.models.stored.precision import bytes_per_value, decode, encode, parts_of
from orchard.strategies.strategy import start_server, train_client


def drawn(scale: float, rows: int = 33, columns: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator) * scale
    values[0] = 0  # a row of zeros has no magnitude to divide by
    values[1, 3] = 40 * scale  # and an outlier takes the steps of its row or block
    return values


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_int8_is_off_by_half_a_step_of_its_row_at_most(scale: float) -> None:
    values = drawn(scale)
    back = decode(encode("int8", values), tuple(values.shape), torch.float32)
    bound_R1 = values.abs().amax(dim=1, keepdim=True) / 254
    assert bool(((back - values).abs() <= bound_R1 * 1.001).all())
    assert (back - values).abs().max() > 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_nf4_is_off_by_0_152_of_its_block_at_most(scale: float) -> None:
    values = drawn(scale)
    back = decode(encode("nf4", values), tuple(values.shape), torch.float32)
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % 64)).view(-1, 64)
    bound_B1 = 0.152 * flat.abs().amax(dim=1, keepdim=True)
    error = torch.nn.functional.pad((back - values).flatten(), (0, -values.numel() % 64))
    assert bool((error.view(-1, 64).abs() <= bound_B1 * 1.001).all())
    # Of normal values most are far closer: the levels are quantiles.
    normal = drawn(scale)[2:]
    off = decode(encode("nf4", normal), tuple(normal.shape), torch.float32) - normal
    assert off.square().mean().sqrt() < 0.11 * normal.square().mean().sqrt()


@pytest.mark.parametrize(("precision", "expected"), [("bf16", 2), ("int8", 1.01), ("nf4", 0.5625)])
def test_what_a_value_takes(precision: str, expected: float) -> None:
    shape, dtype = (512, 1024), torch.bfloat16
    parts = encode(precision, torch.ones(shape, dtype=dtype))
    stated = parts_of(precision, shape, dtype)
    assert {n: (tuple(t.shape), t.dtype) for n, t in parts.items()} == stated
    size = sum(t.numel() * t.element_size() for t in parts.values()) / (512 * 1024)
    assert size == pytest.approx(expected, rel=0.01)
    if precision != "bf16":
        assert bytes_per_value(precision) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_few_bits_are_the_same_in_memory_and_mapped(precision: str, tmp_path: Path) -> None:
    folder = shutil.copytree(short_model(), tmp_path / "m", ignore=shutil.ignore_patterns(FOLDER))
    opened = [
        open_base(str(folder), dtype="bfloat16", placement=Placement(kind, precision=precision))
        for kind in ("memory", "mapped", "mapped")
    ]
    full = open_base(str(folder), dtype="bfloat16")
    assert opened[0].digest == opened[1].digest == opened[2].digest != full.digest
    ids_BS = torch.arange(2, 40)[None]
    with torch.no_grad():
        found = [base.view.model(input_ids=ids_BS).logits for base in (*opened[:2], full)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    agree = torch.nn.functional.cosine_similarity(found[0].float(), found[2].float(), dim=-1)
    assert agree.mean() > 0.97


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_round_of_flex_trains_over_few_bits(precision: str, tmp_path: Path) -> None:
    recipe = quick_recipe("flex", f"model.frozen_precision={precision}")
    strategy, clients, model, _ = build(recipe, tmp_path)
    state = start_server(strategy, model.fresh)
    update = train_client(strategy, clients[0], Task(1, state.shared, LocalSettings(2, 0, 1e-3)))
    assert all(bool(tensor.isfinite().all()) for tensor in update.delta.values())
    assert any(bool(tensor.any()) for tensor in update.delta.values())
    kept = clients[0].store.load(before_round=2)
    assert kept is not None
    floats = {t.dtype for t in kept.tensors.values() if t.is_floating_point()}
    assert floats == {torch.float32}
