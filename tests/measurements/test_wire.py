"""The table of bytes: its formula is that of real messages, and of a run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from federations import NUM_LAYERS, quick_recipe, run_quickly
from orchard.measurements.wire import (
    BASE_9M,
    LARGE,
    as_listed,
    bench_wire,
    compute,
    elements_of,
    int8_bits,
    measure_small,
    sent_names,
)
from orchard.models.stored.random_checkpoint import Shape
from orchard.results import MetricsLog

SMALL = Shape(2, 32, 2, 4, 2, 16, 16, 64)


def test_computed_lengths_are_those_of_messages() -> None:
    table, error = measure_small(replace(BASE_9M, layers=2))
    assert error < 0.01
    up = {m: {e: own["up_bytes"] for e, own in rows.items()} for m, rows in table.items()}
    assert up["flex"] == up["fedavg_attention"]
    for encoding in ("float32", "bfloat16", "int8"):
        assert up["flex"][encoding] < up["hfedmoe"][encoding] < up["fedavg_experts"][encoding]
    for rows in up.values():
        assert rows["bfloat16"] < 0.52 * rows["float32"]
        assert rows["int8"] < 0.54 * rows["bfloat16"]
    down = {e: own["down_bytes"] for e, own in table["hfedmoe"].items()}
    assert down["int8"] < 0.54 * down["bfloat16"]
    assert down["bfloat16"] > 1.7 * up["hfedmoe"]["bfloat16"]  # all experts go down, half come up


def test_what_is_sent() -> None:
    elements = elements_of(SMALL)
    attention = sent_names("flex", elements, up=True)
    assert len(attention) == 2 * 3 * 2
    assert all(".self_attn." in name for name in attention)
    experts = sent_names("fedavg_experts", elements, up=True)
    assert len(experts) == len(attention) + 2 * 4 * 4
    half = [n for n in sent_names("hfedmoe", elements, up=True) if ".experts." in n]
    assert len(half) == 2 * 2 * 4
    # A factor A for each router, and a row of B for each expert.
    assert len(sent_names("hfedmoe", elements, up=False)) == len(experts) + 2 * (1 + 4)


def test_listed_experts_have_two_adapters_where_fused_ones_have_one() -> None:
    listed = as_listed(elements_of(SMALL), SMALL)
    expert = {n: e for n, e in listed.items() if ".layers.1.experts.3." in f".{n}"}
    assert sum(expert.values()) == 3 * 32 * (SMALL.width + SMALL.expert_width)
    assert not any("gate_up" in name for name in listed)


@pytest.mark.parametrize(("name", "expert_values"), [("qwen1.5-moe-a2.7b", 477_757_440)])
def test_large_shapes_are_those_of_the_published_models(name: str, expert_values: int) -> None:
    shape = LARGE[name]
    per_expert = 3 * 32 * (shape.width + shape.expert_width)
    assert shape.layers * shape.experts * per_expert == expert_values


def test_bytes_of_flex_are_those_of_a_run(tmp_path: Path) -> None:
    recipe = quick_recipe(
        "flex", "model.lora_rank=32", "communication.dtype=int8", "server.rounds=1"
    )
    run_quickly(tmp_path, recipe)
    lines = MetricsLog(tmp_path / "metrics.jsonl").read()
    sent = [line["round/uplink_bytes"] for line in lines if "round/uplink_bytes" in line]
    # The packaged model's attention is as wide as this.
    shape = Shape(NUM_LAYERS, 128, 4, 8, 2, 96, 128, 768)
    computed = compute(elements_of(shape))["flex"]["int8"]["up_bytes"]
    assert sent[-1] / 4 == pytest.approx(computed, rel=0.05)


def test_the_bench_reports_ratios_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchard.measurements.wire.BASE_9M", SMALL)
    found = bench_wire(repeats=1, large={"small": SMALL}, timed_values=2**17)
    assert found["lora_rank"] == 32
    small = found["models"]["small"]["fused"]
    ratio = small["fedavg_experts"]["bfloat16"]["up_bytes"] / small["flex"]["int8"]["up_bytes"]
    assert found["fedavg_experts_over_flex"]["small"]["fused"]["bfloat16 over int8"] == ratio
    assert set(found["fedavg_experts_over_flex"]["small"]) == {"fused", "listed"}
    for own in found["speed"].values():
        assert min(own.values()) > 0


def test_the_levels_of_int8_hold_little_that_a_code_could_save() -> None:
    bits = int8_bits(2**16)
    assert bits["sent_bits"] == 8 + 16 / 128
    assert 7 < bits["entropy_bits"] < 8
