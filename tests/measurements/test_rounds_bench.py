"""The measurement of rounds runs the simulator, and memory does not grow with clients."""

from __future__ import annotations

import pytest

from orchard.measurements import rounds
from orchard.measurements.rounds import bench_rounds, run_rounds


def test_a_turn_is_measured_with_all_of_its_messages() -> None:
    found = run_rounds(5, 2)
    assert found["seconds_per_client"] > 0
    # Headers hold names, shapes and metrics, and less than the tensors take.
    assert 0 < found["header_bytes_per_client"] < 0.2 * found["message_bytes_per_client"]
    assert 100 < found["log_bytes_per_client"] < 2000
    assert found["peak_bytes"] >= found["process_bytes"]


@pytest.mark.long
def test_memory_does_not_grow_with_clients() -> None:
    found = rounds._measure(400, 1)
    # Of 400 clients: their messages alone are 81 MB.
    assert found["peak_bytes"] - found["process_bytes"] < 20_000_000


def test_medians_and_growth_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((0.003, 0.001, 0.002))

    def measure(num_clients: int, num_rounds: int) -> dict[str, float]:
        taken = next(seconds) if num_rounds == 3 else 0.0
        return {"seconds_per_client": taken, "peak_bytes": 1000.0 + num_clients}

    monkeypatch.setattr(rounds, "_measure", measure)
    found = bench_rounds(repeats=3, memory_of=(100, 1100))
    assert found["seconds_per_client"] == 0.002
    assert found["peak_bytes_of"] == {"100": 1100.0, "1100": 2100.0}
    assert found["peak_ratio"] == pytest.approx(2100 / 1100)
    assert found["grown_bytes_per_client"] == 1.0


def test_rounds_that_fail_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(RuntimeError, match="measured rounds failed"):
        rounds._measure(2, 1)
