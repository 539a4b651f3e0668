"""The short form: one SIGKILL to each kind of process, and the undisturbed run's tensors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from kills import FEW_ROWS, TARGETS, Saboteur

from federations import short_model
from orchard.deployment.localhost import ORCHARD, Processes, running
from orchard.recipe.reading import to_toml
from sites import same, shared_tensors, site_recipe, write_sites

pytestmark = pytest.mark.deployment


def test_one_kill_of_each_kind_changes_no_tensor(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data")
    recipe = tmp_path / "recipe.toml"
    probe = "deployment.probe_seconds=4"
    recipe.write_text(to_toml(site_recipe("flex", data, "server.rounds=4", probe)))
    simulated = tmp_path / "simulated"
    command = [ORCHARD, "run", str(recipe), "--out", str(simulated)]
    subprocess.run(command, check=True, capture_output=True)
    federation = Processes(tmp_path / "federation", data, ["--model", short_model(), *FEW_ROWS])
    with running(federation):
        saboteur = Saboteur(federation, recipe, (), run=tmp_path / "run", seed=0)
        saboteur.go(TARGETS, pause=(4.0, 12.0), seconds=500.0)
    assert len(saboteur.kills) >= 4, saboteur.kills
    assert same(shared_tensors(tmp_path / "run"), shared_tensors(simulated))
