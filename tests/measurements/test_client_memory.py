"""What is predicted of a client's memory is what a process of its own needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchard.measurements import run_bench
from orchard.measurements.client_memory import Case, bench_memory, measure, predict
from orchard.models.stored.loading import check_model
from orchard.models.stored.random_checkpoint import Shape, expert_share, write_random_checkpoint

# Small, and yet more than the libraries take.
SHAPE = Shape(layers=4, width=256, heads=4, experts=16, expert_width=768, shared_width=256)
ADAPTERS = {"full_targets": (), "lora_targets": ("q_proj", "v_proj", "router", "experts")}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("random")
    write_random_checkpoint(folder, SHAPE, dtype="bfloat16", seed=0)
    return Case(str(folder), steps=2, num_threads=1)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, marks=pytest.mark.exhaustive),
        pytest.param({"mode": "carve", "experts": 4}, marks=pytest.mark.long),
        pytest.param({"mode": "mask", "experts": 4}, marks=pytest.mark.exhaustive),
        pytest.param(ADAPTERS, marks=pytest.mark.exhaustive),
        pytest.param({"mode": "carve", "experts": 8, **ADAPTERS}, marks=pytest.mark.long),
    ],
    ids=["whole", "carve", "mask", "lora", "lora-carve"],
)
def test_the_predicted_peak_is_hardly_too_low_and_not_far_too_high(
    case: Case, overrides: dict[str, object]
) -> None:
    case = replace(case, **overrides)  # type: ignore[arg-type]
    found, predicted = measure(case), predict(case)
    # What libraries take is predicted for bfloat16 and many layers, and is more than here.
    assert 0.85 < predicted.total / found["peak_memory_bytes"] < 1.25
    # More than half of it is no constant.
    assert found["peak_memory_bytes"] - found["process_bytes"] > 0.3 * found["process_bytes"]


def test_a_random_model_is_of_experts(case: Case) -> None:
    assert 0.85 < expert_share(check_model(case.path, case.lora)) < 0.97


def test_both_clients_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = []

    def note(case: Case) -> dict[str, float]:
        cases.append(case.mode)
        is_whole = case.mode == "whole"
        return {
            "peak_memory_bytes": 8e9 if is_whole else 2e9,
            "tokens_per_second": 100.0 if is_whole else 300.0 + len(cases),
        }

    monkeypatch.setattr("orchard.measurements.client_memory.measure", note)
    found = bench_memory(shape=SHAPE, repeats=3)
    assert cases == ["whole", "carve"] * 3
    assert found["memory_ratio"] == 0.25
    assert found["speedup"] == 3.04  # of medians
    assert found["carved_experts_per_layer"] == 4


def test_a_shape_without_enough_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 85 % of the weights"):
        bench_memory(shape=replace(SHAPE, experts=4, expert_width=64))


def test_an_unknown_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^NAME must be of memory"):
        run_bench("speed", as_json=False, repeats=1)


def test_a_client_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match="a measured client failed"):
        measure(Case(str(tmp_path / "nowhere")))
