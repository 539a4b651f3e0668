"""The round that reaches a level is the first that is as good, in the direction of the metric."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchard.results import MetricsLog
from orchard.studies.convergence import convergence_lines, curves_of, first_at
from orchard.studies.design import read_design
from orchard.studies.running import Chosen, Column, Made, Progress

STUDY = """
reference = "slow"
seeds = [0, 1]
[[method]]
name = "slow"
recipe = "tiny/fedavg"
[[method]]
name = "fast"
recipe = "tiny/fedavg"
set = { client.lr = 0.5 }
"""


def made(folder: Path, losses: dict[int, tuple[float, float]]) -> Made:
    log = MetricsLog(folder / "metrics.jsonl")
    for number, values in losses.items():
        clients = {f"c{k}": {"personal/loss": value} for k, value in enumerate(values)}
        log.append({"kind": "evaluation", "round": number, "seconds": 1.0, "clients": clients})
    return Made(folder, {"summary": {"personal": {"loss": {}}}})


def curves(folder: Path, runs: dict[str, list[dict[int, tuple[float, float]]]]) -> list[str]:
    file = folder / "study.toml"
    file.write_text(STUDY)
    design, progress = read_design(file), Progress("", 4)
    for name, of_seed in runs.items():
        own = {}
        for seed, losses in enumerate(of_seed):
            (folder / f"{name}-{seed}").mkdir()
            own[seed] = made(folder / f"{name}-{seed}", losses)
        progress.columns["", name] = Column(Chosen(), own)
    return convergence_lines(curves_of(design, progress), design.reference)


def test_first_at_goes_in_the_direction_of_the_metric() -> None:
    values = {2: 3.0, 4: 2.0, 6: 2.5}
    assert first_at(values, 2.5, is_higher_better=False) == 4
    assert first_at(values, 2.5, is_higher_better=True) == 2
    assert first_at(values, 1.9, is_higher_better=False) is None


def test_a_worked_example(tmp_path: Path) -> None:
    slow = {2: (3.0, 5.0), 4: (2.0, 3.0), 6: (2.0, 2.0)}  # means 4, 2.5, 2: the level is 2
    late = {2: (4.0, 4.0), 4: (3.0, 3.0), 6: (2.5, 2.5)}
    fast = {2: (2.5, 2.5), 4: (1.0, 3.0), 6: (1.0, 1.0)}  # at round 4; 6 / 4 = 1.5 times as fast
    lines = curves(tmp_path, {"slow": [slow, late], "fast": [fast, {**late, 6: (2.6, 2.6)}]})
    assert lines[0] == "## Rounds until as good as slow at its end: loss"
    assert lines[2] == "| method | round by seed | times as fast | round 2 | round 4 | round 6 |"
    assert lines[4] == "| slow | 6 6 | 1.00 | 4.000 | 2.750 | 2.250 |"
    assert lines[5] == "| fast | 4 never | 1.50 (1 of 2 seeds) | 3.250 | 2.500 | 1.800 |"


@pytest.mark.parametrize("runs", [{}, {"slow": [{6: (2.0, 2.0)}], "fast": [{6: (2.0, 2.0)}]}])
def test_runs_that_are_measured_once_have_no_curve(
    tmp_path: Path, runs: dict[str, list[dict[int, tuple[float, float]]]]
) -> None:
    assert curves(tmp_path, runs) == []
