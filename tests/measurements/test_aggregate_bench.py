"""The measurement of aggregation tells the truth about what it measures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchard.communication.messages import decode_update
from orchard.measurements import aggregate
from orchard.measurements.aggregate import (
    Case,
    bench_aggregate,
    compare,
    measure_memory,
    time_sides,
    write_messages,
)

CASE = Case("", num_clients=5, num_tensors=6, num_bytes=4800, dtype="float32")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    made = replace(CASE, folder=str(tmp_path))
    write_messages(made)
    return made


def test_a_round_is_the_mean_of_the_files_that_clients_take_in_turn(case: Case) -> None:
    state, (seconds, cpu_seconds) = aggregate._aggregate(case, aggregate._state(case))
    updates = [decode_update(case.path(client).read_bytes()) for client in range(case.num_clients)]
    weights = [next(iter(update.weight.values())) for update in updates]
    assert weights == [1.0, 2.0, 3.0, 4.0, 1.0]
    for name in case.names():
        expected = sum(w * u.delta[name].double() for w, u in zip(weights, updates, strict=True))
        torch.testing.assert_close(state.shared[name].double(), expected / 11, rtol=1e-5, atol=1e-6)
    assert seconds > 0
    assert cpu_seconds >= 0


def test_flower_makes_the_same_mean_and_both_are_timed(case: Case) -> None:
    pytest.importorskip("flwr")
    found = time_sides(case, repeats=2, with_flower=True, peer_clients=3)
    assert 0 <= found["largest_difference"] < 1e-6
    assert found["flower_version"].count(".") >= 1
    for side in ("copy", "ours", "flower"):
        assert found[f"{side}_seconds_per_update"] > 0


def test_a_mean_that_differs_from_flowers_is_an_error(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = pytest.importorskip("orchard.measurements.flower_peer")
    real = peer.to_arrays
    monkeypatch.setattr(peer, "to_arrays", lambda r: {n: a + 0.01 for n, a in real(r).items()})
    with pytest.raises(RuntimeError, match="both must have one mean"):
        time_sides(case, repeats=1, with_flower=True)


def test_ratios_are_those_of_the_bytes_that_move() -> None:
    timed = {
        "copy_cpu_seconds_per_update": 1.0,
        "ours_cpu_seconds_per_update": 2.0,
        "flower_cpu_seconds_per_update": 8.0,
    }
    assert compare(CASE, timed) == {
        "bandwidth_share": 0.75,  # 3 bytes in 2 s, where a copy moves 2 in 1 s
        "update_bytes_over_copied_bytes": 0.5,
        "copy_bytes_per_second": 9600.0,
        "speedup_over_flower": 4.0,
    }
    # A sum in float32 has twice the bytes of an update in bfloat16.
    assert compare(replace(CASE, dtype="bfloat16"), timed)["bandwidth_share"] == 1.25


def test_what_flower_lacks_is_said_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def elsewhere(what: str, case: Case, **options: bool) -> dict[str, float]:
        asked.append((what, case.num_clients, options["with_flower"]))
        seconds = {f"{side}_cpu_seconds_per_update": 1.0 for side in ("copy", "ours")}
        return seconds if what == "time" else {"peak_trees": 2.0}

    monkeypatch.setattr(aggregate, "has_flower", lambda: False)
    monkeypatch.setattr(aggregate, "_elsewhere", elsewhere)
    found = bench_aggregate(num_clients=9, peer_clients=3, num_bytes=9600, repeats=1)
    assert "not installed" in found["flower"]
    assert "speedup_over_flower" not in found["float32"]
    assert asked == [("time", 9, False), ("memory", 9, False)] * 3


@pytest.mark.long
def test_a_round_holds_one_sum_and_one_message(tmp_path: Path) -> None:
    # Large against what the process takes here and there.
    case = Case(
        str(tmp_path), num_clients=12, num_tensors=4, num_bytes=32_000_000, dtype="bfloat16"
    )
    write_messages(case)
    found = aggregate._elsewhere("memory", case, with_flower=False)
    # A message is half of a tree: with two of them, or one widened, it would be 2 and more.
    assert 1.0 < found["peak_trees"] < 1.85
    assert found["peak_trees_with_global"] == pytest.approx(found["peak_trees"] + 1, abs=0.3)
    assert math.isfinite(found["seconds_per_update"])


def test_a_measured_process_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match="a measured process failed"):
        aggregate._elsewhere("memory", CASE, with_flower=False)


def test_memory_is_measured_in_trees(case: Case) -> None:
    found = measure_memory(case, with_flower=False)
    trees = (found["peak_bytes"] - found["process_bytes"]) / case.tree_bytes
    assert found["peak_trees_with_global"] == trees
