"""A model that is larger than the memory for it trains to the digest of the one in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchard.measurements import placement
from orchard.measurements.placement import METHODS, bench_placement, run_round, sample
from orchard.models.stored.random_checkpoint import Shape

SMALL = Shape(layers=2, width=64, heads=4, experts=8, expert_width=64, shared_width=64)


@pytest.mark.exhaustive
def test_both_rounds_end_with_the_digest_of_memory() -> None:
    found = bench_placement(repeats=1, shape=SMALL, is_limited=False)
    assert found["same_digest"] is True
    for method in METHODS:
        assert found[method]["peak_anonymous_bytes"] > 10**8
        # The process itself is most of so small a model's peak. It is predicted for the machine
        # where it takes most, and differs by half; the true shape's record has it within a tenth.
        assert 0.9 < found[method]["predicted_over_measured"] < 2


def test_what_is_found_is_of_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    digest = "a"

    def run(options: list[str], out: Path, *, limit: int = 0) -> dict[str, Any]:
        limits.append(limit)
        peak = 10**9 if limit else 4 * 10**9
        own = digest if limit or "hfedmoe" not in out.name else "b"
        return {
            "seconds": 1.0,
            "peak_anonymous_bytes": peak + len(limits),
            "bytes_read": 7,
            "digest": (own, own),
        }

    monkeypatch.setattr(placement, "run_round", run)
    monkeypatch.setattr(placement, "predict_round", lambda options: 1_050_000_000)
    found = bench_placement(repeats=2, shape=SMALL)
    third = found["model_bytes"] // 3
    assert limits == [third, third, 0] * 2
    assert found["flex"]["same_digest"]
    assert not found["hfedmoe"]["same_digest"]
    assert not found["same_digest"]
    assert found["peak_anonymous_bytes"] == 10**9 + 5
    assert found["predicted_over_measured"] == pytest.approx(1.05)


def test_a_run_beyond_its_limit_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a measured run failed"):
        run_round([], tmp_path / "run", limit=50_000_000)


def test_the_memory_of_another_process_is_sampled() -> None:
    code = "import time; own = b'x' * 200_000_000; time.sleep(0.5)"
    peak, _ = sample(subprocess.Popen([sys.executable, "-c", code]))
    assert 200_000_000 < peak < 260_000_000
