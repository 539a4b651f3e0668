"""Rows of a page are what a run's folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from made_runs import CLIENTS, write_run
from orchard.pages import gathering
from orchard.pages.gathering import gather


def test_the_last_rows_of_the_curves_are_the_result(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    gathered = gather([tmp_path / "run"])
    (run,) = gathered.runs
    last = {
        (row["model"], row["metric"], row["client"]): row["value"]
        for row in gathering.curve_rows(gathered.runs)
        if row["model"] != "in training"
    }
    for model, by_metric in run.result["metrics"].items():
        for metric, by_client in by_metric.items():
            for client, value in by_client.items():
                assert last.pop((model, metric, client)) == value
    assert not last


def test_means_are_those_of_compare_and_clients_stand_beside_them(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"run-{seed}", seed=seed)
    gathered = gather([tmp_path / "run-0", tmp_path / "run-1"])
    (row,) = gathered.comparison.rows
    rows = gathering.quality_rows(gathered)
    means = {(r["model"], r["metric"]): r for r in rows if r["kind"] == "mean"}
    assert set(means) == {(model, metric) for model, by in row.metrics.items() for metric in by}
    for (model, metric), mean in means.items():
        estimate = row.metrics[model][metric]
        assert (mean["value"], mean["low"], mean["high"], mean["worst"]) == (
            estimate.mean,
            estimate.low,
            estimate.high,
            estimate.worst,
        )
        own = [
            r
            for r in rows
            if r["kind"] == "client" and (r["model"], r["metric"]) == (model, metric)
        ]
        assert len(own) == 2 * len(CLIENTS)


def test_bytes_add_up_over_rounds(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    gathered = gather([tmp_path / "run"])
    rows = gathering.cost_rows(gathered.runs)
    result = gathered.runs[0].result
    total = sum(result["uplink_bytes_per_round"]) + sum(result["downlink_bytes_per_round"])
    assert max(row["megabytes"] for row in rows) == pytest.approx(total / 1e6)
    assert {row["megabytes"] for row in rows if row["round"] == 0} == {0.0}


def test_grafts_say_what_they_restore_and_how_far_they_are_open(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    rows = gathering.graft_rows(gather([tmp_path / "run"]).runs)
    assert len(rows) == len(CLIENTS) * 2
    for row in rows:
        assert row["restored"] == pytest.approx(1 - row["loss"] / row["none"])
        assert 0 < row["gate"] < 1


def test_experts_count_the_rounds_in_which_they_were_sent(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    rows = gathering.moved_rows(gather([tmp_path / "run"]).runs)
    assert {(row["expert"], row["times"], row["share"]) for row in rows} == {
        (0, 2, 1.0),
        (1, 1, 0.5),
        (2, 0, 0.0),
    }


def test_what_was_refused_is_shown_with_its_reason_and_a_cut_line_is_no_event(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "run")
    refused = {"event": "refused", "round": 1, "site": "north", "reason": "norm must be finite"}
    (tmp_path / "run" / "audit.jsonl").write_text(f'{json.dumps(refused)}\n[]\n7\n{{"event": "ref')
    (event,) = gathering.event_rows(gather([tmp_path / "run"]).runs)
    assert (event["client"], event["reason"]) == ("north", "norm must be finite")


@pytest.mark.parametrize("twice", [("run", "run"), ("run", "./run"), ("run", "other/../run")])
def test_a_run_that_is_named_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: tuple[str, str]
) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^runs must be different folders, got run 2 times"):
        gather(twice)


def test_a_run_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="finish the run first"):
        gather([tmp_path])


def test_a_log_of_other_keys_has_rows_all_the_same(tmp_path: Path) -> None:
    """A run without grafts, gates or experts has none of their rows, and no error."""
    write_run(tmp_path / "run", is_plain=True)
    runs = gather([tmp_path / "run"]).runs
    empty: list[Any] = [
        *gathering.graft_rows(runs),
        *gathering.gate_rows(runs),
        *gathering.moved_rows(runs),
        *gathering.active_rows(runs),
        *gathering.event_rows(runs),
    ]
    assert empty == []
    assert gathering.phase_rows(runs)
    assert [row["client"] for row in gathering.client_rows(runs)] == list(CLIENTS)
