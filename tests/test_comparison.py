"""Runs that differ in their seed alone are one row, with the interval that textbooks give."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from orchard.cli import app
from orchard.comparison import (
    Comparison,
    compare_runs,
    comparison_as_csv,
    comparison_as_json,
    comparison_as_latex,
    comparison_table,
    half_interval,
    student_t,
)
from orchard.recipe.options import Recipe
from orchard.recipe.reading import resolve, to_toml


def write_run(folder: Path, *changes: str, accuracy: float = 0.5, **facts: Any) -> Path:
    """Write a finished run's recipe and result, as ``run_experiment`` does."""
    recipe = resolve({}, changes).recipe
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(to_toml(recipe))
    summary = {
        "loss": {"mean": 1.0 + accuracy, "worst": 2.0 + accuracy, "spread": 0.1},
        "accuracy": {
            "mean": accuracy,
            "worst": accuracy - 0.1,
            "spread": 0.1,
            "mean_stderr": 0.035,
        },
    }
    result = {
        "seed": recipe.seed,
        "strategy": recipe.strategy.name,
        "base_digest": "b",
        "uplink_bytes_per_round": [100, 200],
        "summary": {"base": summary, "global": summary},
        **facts,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def three_seeds(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / f"seed_{seed}", f"seed={seed}", accuracy=accuracy)
        for seed, accuracy in ((4, 0.4), (5, 0.5), (6, 0.6))
    ]


def text(comparison: Comparison, *, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(comparison, console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# From the t table of any textbook, two-sided 95 %.
@pytest.mark.parametrize(
    ("freedom", "bound"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)],
)
def test_bounds_of_students_t_are_those_of_the_tables(freedom: int, bound: float) -> None:
    assert student_t(freedom) == pytest.approx(bound, abs=5e-4)


def test_with_many_degrees_of_freedom_students_t_is_the_normal() -> None:
    assert student_t(20_000) == pytest.approx(1.95996, abs=5e-4)
    assert student_t(1, level=0.5) == pytest.approx(1.0)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(-5, 5), st.floats(0.5, 5))
def test_an_interval_moves_and_scales_with_its_values(
    values: list[float], by: float, scale: float
) -> None:
    half = half_interval(values)
    assert half is not None
    assert half_interval([scale * v + by for v in values]) == pytest.approx(scale * half, abs=1e-6)
    assert half_interval([*values, *values]) <= half + 1e-9  # type: ignore[operator]


def test_runs_that_differ_in_their_seed_are_one_row(three_seeds: list[Path]) -> None:
    comparison = compare_runs(three_seeds)
    (row,) = comparison.rows
    assert row.seeds == (4, 5, 6)
    assert comparison.differing == comparison.notes == ()
    estimate = row.metrics["global"]["accuracy"]
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert estimate.mean == pytest.approx(0.5)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert estimate.worst == pytest.approx(0.4)
    assert estimate.per_seed == (0.4, 0.5, 0.6)
    assert row.uplink_bytes_per_round == 150


def test_runs_that_differ_in_more_stay_apart(three_seeds: list[Path], tmp_path: Path) -> None:
    others = [
        write_run(tmp_path / "lr", "seed=7", "client.lr=0.5"),
        write_run(tmp_path / "base", "seed=8", base_digest="another"),
        write_run(tmp_path / "method", "seed=9", strategy="mine"),
    ]
    comparison = compare_runs([*three_seeds, *others])
    assert [row.seeds for row in comparison.rows] == [(4, 5, 6), (7,), (8,), (9,)]
    assert comparison.differing == ("client.lr",)
    alone = comparison.rows[1].metrics["global"]["accuracy"]
    assert (alone.low, alone.high, alone.stderr) == (None, None, 0.035)


def test_how_long_a_coordinator_waits_keeps_no_runs_apart(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "seed=1", "deployment.round_seconds=5"),
        write_run(tmp_path / "b", "seed=2"),
    ]
    assert len(compare_runs(runs).rows) == 1


def test_a_seed_that_comes_twice_is_not_joined(three_seeds: list[Path], tmp_path: Path) -> None:
    comparison = compare_runs([*three_seeds, write_run(tmp_path / "again", "seed=5")])
    assert [row.seeds for row in comparison.rows] == [(4,), (5,), (6,), (5,)]
    assert "a seed comes twice" in comparison.notes[0]


def test_a_run_whose_recipe_is_no_longer_one_is_a_row_of_its_own(
    three_seeds: list[Path],
) -> None:
    (three_seeds[0] / "recipe.toml").write_text("old.key = 1\n")
    (three_seeds[1] / "recipe.toml").unlink()
    comparison = compare_runs(three_seeds)
    assert [row.seeds for row in comparison.rows] == [(4,), (5,), (6,)]
    assert [note.partition(" is a row")[0] for note in comparison.notes] == [
        str(folder) for folder in three_seeds[:2]
    ]


@pytest.mark.parametrize("width", [60, 200])
def test_a_table_fits_its_console_and_has_every_number(three_seeds: list[Path], width: int) -> None:
    table = text(compare_runs(three_seeds), width=width)
    assert max(map(len, table.splitlines())) <= width
    assert table.count("50.0 [25.2, 74.8] (40.0)") == 2
    assert table.count("1.500 [1.252, 1.748] (2.500)") == 2
    assert "seeds 4-6" in table
    assert "…" not in table


def test_a_single_run_keeps_the_standard_error_of_its_accuracy(tmp_path: Path) -> None:
    table = text(compare_runs([write_run(tmp_path / "run[a]", accuracy=0.7)]), width=200)
    assert "70.0 ± 3.5 (60.0)" in table
    assert "stderr" not in table
    assert "run[a]" in table


def test_json_and_csv_have_the_same_numbers(three_seeds: list[Path], tmp_path: Path) -> None:
    comparison = compare_runs([*three_seeds, write_run(tmp_path / "lr", "client.lr=0.5")])
    found = json.loads(comparison_as_json(comparison))["rows"]
    lines = list(csv.DictReader(io.StringIO(comparison_as_csv(comparison))))
    assert len(lines) == 2 * 2 * 2
    for line in lines:
        (row,) = [r for r in found if r["runs"] == line["runs"].split(";")]
        estimate = row["metrics"][line["model"]][line["metric"]]
        assert row["seeds"] == [int(seed) for seed in line["seeds"].split(";")]
        for column, name in (("mean", "mean"), ("low_95", "low"), ("high_95", "high")):
            assert line[column] == ("" if estimate[name] is None else str(estimate[name]))


def test_latex_is_a_tabular_with_a_cell_for_each_column(
    three_seeds: list[Path], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other", strategy="my_module:share_a")
    lines = comparison_as_latex(compare_runs([*three_seeds, other])).splitlines()
    rows = [line for line in lines if line.endswith(r"\\")]
    assert {line.count("&") for line in rows} == {3}
    assert len(rows) == 1 + 2 * 2
    assert r"fedavg, seeds 4-6 & global & $1.500 \pm 0.248$ & $50.0 \pm 24.8$ \\" in rows
    assert any(r"my\_module:share\_a, seed 0" in line for line in rows)


def test_the_command_prints_one_form(three_seeds: list[Path]) -> None:
    runs = [str(folder) for folder in three_seeds]
    forms = {"--json": comparison_as_json, "--csv": comparison_as_csv}
    for option, form in {**forms, "--latex": comparison_as_latex}.items():
        said = CliRunner().invoke(app, ["compare", *runs, option])
        assert said.stdout.rstrip("\n") == form(compare_runs(runs)).rstrip("\n")
    both = CliRunner().invoke(app, ["compare", *runs, "--json", "--csv"])
    assert both.exit_code == 2
    assert "--json, --csv and --latex" in both.stderr


def test_the_default_recipe_can_be_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert compare_runs([tmp_path / "run"]).rows[0].strategy == Recipe().strategy.name


ALIKE = {"base_digest": "b", "test_digest": "t"}


def test_runs_on_one_base_and_one_test_are_ranked_without_a_word(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", **ALIKE),
        write_run(tmp_path / "two", "strategy.name=local", **ALIKE),
    ]
    assert compare_runs(runs).incomparable == ()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"base_digest": "c"}, "the base model is not the same, so these are not to be ranked"),
        ({"test_digest": "u"}, "the test data is not the same, so these are not to be ranked"),
        ({"test_digest": None}, "whether the test data is the same is not known of"),
    ],
)
def test_runs_that_cannot_be_ranked_say_so(
    facts: dict[str, Any], words: str, tmp_path: Path
) -> None:
    one, two = (
        write_run(tmp_path / "one", **ALIKE),
        write_run(tmp_path / "two", "strategy.name=local", **{**ALIKE, **facts}),
    )
    (sentence,) = compare_runs([one, two]).incomparable
    assert words in sentence
    assert str(two) in sentence
    shown = CliRunner().invoke(app, ["compare", str(one), str(two)])
    assert shown.exit_code == 0
    assert words in " ".join(shown.stderr.split())
    as_json = json.loads(CliRunner().invoke(app, ["compare", "--json", str(one), str(two)]).stdout)
    assert as_json["incomparable"] == [sentence]


def test_a_test_drawn_by_the_seed_is_compared_seed_by_seed(tmp_path: Path) -> None:
    def write(method: str, seed: int, test: str) -> Path:
        changes = (f"seed={seed}", f"strategy.name={method}")
        return write_run(tmp_path / f"{method}{seed}", *changes, base_digest="b", test_digest=test)

    flex, local = ([write(m, 0, "t0"), write(m, 1, "t1")] for m in ("flex", "local"))
    assert compare_runs([*flex, *local]).incomparable == ()
    # The same seed with another test, and no seed in common.
    assert compare_runs([*flex, write("fedavg", 1, "other")]).incomparable
    assert compare_runs([*flex, write("fedprox", 2, "t2")]).incomparable
    assert compare_runs([*flex, write("fedadam", 3, "t1")]).incomparable
