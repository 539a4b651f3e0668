"""Summaries and tables of results."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from orchard.reports import build_result, mean_stderr, read_result, result_table
from orchard.results import MetricsLog

ROUND = {
    "round/seconds": 1.0,
    "round/overhead_seconds": 0.1,
    "round/train_seconds": 0.9,
    "round/peak_memory_bytes": 10,
    "round/uplink_bytes": 100,
    "round/downlink_bytes": 100,
    "round/train_loss": 1.0,
}


def result(folder: Path, *, has_central_test: bool) -> dict[str, Any]:
    """Return the result of two clients with the accuracies 0.8 and 0.6."""
    log = MetricsLog(folder / "metrics.jsonl")
    measured = {
        "a": {"global/accuracy": 0.8, "global/accuracy_stderr": 0.03, "global/loss": 1.0},
        "b": {"global/accuracy": 0.6, "global/accuracy_stderr": 0.04, "global/loss": 2.0},
    }
    for values in measured.values():
        values |= {
            f"global/retention_{name}": values[f"global/{name}"]
            for name in ("accuracy", "accuracy_stderr")
        }
    log.append({"kind": "evaluation", "round": 1, "seconds": 1.0, "clients": measured})
    log.append({"kind": "round", "round": 1, **ROUND})
    facts = {
        "seed": 0,
        "strategy": "fedavg",
        "clients": {"a": {}, "b": {}},
        "data": {"has_central_test": has_central_test},
    }
    return build_result(folder, facts)


def text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_that_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=r"result\.json must be"):
        read_result(tmp_path)


def test_independent_errors_average_out_and_shared_ones_do_not() -> None:
    assert mean_stderr([0.03, 0.04], is_shared=False) == pytest.approx(0.05 / 2)
    assert mean_stderr([0.03, 0.04], is_shared=True) == pytest.approx(0.035)
    assert mean_stderr([0.02] * 4, is_shared=False) == pytest.approx(0.02 / math.sqrt(4))
    assert mean_stderr([0.02] * 4, is_shared=True) == pytest.approx(0.02)


@pytest.mark.parametrize(("has_central_test", "error"), [(False, 0.025), (True, 0.035)])
def test_the_record_holds_accuracy_and_its_standard_error(
    has_central_test: bool, error: float, tmp_path: Path
) -> None:
    found = result(tmp_path, has_central_test=has_central_test)
    assert found["metrics"]["global"]["accuracy_stderr"] == {"a": 0.03, "b": 0.04}
    summary = found["summary"]["global"]
    assert set(summary) == {"accuracy", "loss", "retention_accuracy"}
    assert summary["accuracy"]["mean"] == pytest.approx(0.7)
    assert summary["accuracy"]["worst"] == 0.6
    assert summary["accuracy"]["mean_stderr"] == pytest.approx(error)
    # What clients must retain is the same for all, whatever they test on.
    assert summary["retention_accuracy"]["mean_stderr"] == pytest.approx(0.035)
    assert "mean_stderr" not in summary["loss"]


def test_tables_show_accuracy_with_its_standard_error(tmp_path: Path) -> None:
    found = result(tmp_path, has_central_test=True)
    table = text(result_table(found))
    assert "80.0 ± 3.0" in table
    assert "70.0 ± 3.5" in table
    assert "stderr" not in table


def test_a_table_has_a_column_for_each_client(tmp_path: Path) -> None:
    table = result_table(result(tmp_path, has_central_test=True))
    headers = [column.header for column in table.columns]
    assert headers == ["metric", "model", "a", "b", "mean", "worst", "spread"]
    assert [column.justify for column in table.columns[2:]] == ["right"] * 5
