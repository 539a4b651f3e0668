"""A study's record with chosen numbers, for what reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchard.results import write_json

METHODS = ("fedavg", "flex", "</script><img src=x onerror=alert(1)>")
CELLS = ("max_train = 64", "max_train = 16")
METRICS = ("loss", "rouge_l")
_VERDICTS = ("reference", "better", "no difference seen")


def write_study(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """Write ``study.json``, and return its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        _row(cell, place, metric, float(1 + cells + place) / 7)
        for cells, cell in enumerate(CELLS)
        for metric in METRICS
        for place in range(len(METHODS))
    ]
    record = {
        "title": "Which is better?",
        "reference": METHODS[0],
        "num_runs": 20,
        "num_done": 18,
        "versions": {"python": "3.11"},
        "commit": None,
        "hardware": {"cpu": "a CPU"},
        "base_digest": "2" * 64,
        "columns": [
            {
                "cell": cell,
                "method": method,
                "options": {"client.lr": 0.01},
                "tried": [[{"client.lr": 0.01}, "2.5"], [{"client.lr": 0.1}, "inf"]],
                "runs": [],
            }
            for cell in CELLS
            for method in METHODS
        ],
        "rows": rows,
        "curves": [
            {
                "cell": cell,
                "method": method,
                "metric": metric,
                "values": {"2": 3.5, "4": 3.0 + place / 8},
                "rounds": {"0": 4 if place < 2 else None},
                "times_as_fast": 1.0 if place < 2 else None,
            }
            for cell in CELLS
            for metric in METRICS
            for place, method in enumerate(METHODS)
        ],
        "digest": "3" * 64,
    }
    write_json(folder / "study.json", record | changes)
    return rows


def _row(cell: str, place: int, metric: str, value: float) -> dict[str, Any]:
    difference = {"mean": -0.02 * place, "low": -0.05, "high": 0.01 - 0.01 * place, "p": 0.01}
    return {
        "cell": cell,
        "method": METHODS[place],
        "metric": metric,
        "seeds": [0, 1, 2],
        "mean": value,
        "spread": 0.01,
        "worst": value + 0.1,
        "clients": {"harbor": value - 0.05, "hill": value + 0.05},
        "difference": difference if place else None,
        "corrected_p": 0.02 if place else None,
        "verdict": _VERDICTS[place],
        "private": 1_000.0 * place,
        "shared": 10_000.0,
        "uplink_bytes": 40_000.0,
        "downlink_bytes": 40_000.0,
        "steps": 60.0,
        "seconds": 12.5,
        "search_seconds": 1.5 * place,
        "row_seconds": 0.0625,
        "options": {"client.lr": 0.01},
    }
