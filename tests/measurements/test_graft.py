"""The measurement of graft search tells the truth about what it measures."""

from __future__ import annotations

from orchard.measurements.graft import bench_graft


def test_searches_agree_with_running_every_set() -> None:
    found = bench_graft(
        num_experts=12,
        width=32,
        expert_width=24,
        num_tokens=64,
        sizes=(1, 2, 3),
        searched_sizes=(6,),
        repeats=1,
        num_threads=1,
    )
    assert found["small_same_choice"] is True
    assert all(0 <= found[f"loss_error_r{size}"] < 1e-9 for size in (1, 2, 3))
    assert all(value > 0 for key, value in found.items() if "seconds" in key)
    assert 0 < found["beam_bound_r6"] <= found["beam_loss_r6"]
    for size in (1, 2, 3):
        seconds = found[f"enumeration_extrapolated_seconds_r{size}"]
        assert found[f"speedup_r{size}"] == seconds / found[f"search_seconds_r{size}"]
