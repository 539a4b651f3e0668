"""Without an extra, or with a part of one, a command says in one line what it lacks."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from orchard.extras import EXTRAS, lacking, require, what_brings
from orchard.tracking.trackers import TRACKERS

ROOT = Path(__file__).parent.parent

# In a process of its own: what is imported here already would not be missed.
WITHOUT = """
import importlib, json, pkgutil, sys
from importlib.machinery import PathFinder
import orchard
from orchard.cli import app
from orchard.extras import EXTRAS
from typer.testing import CliRunner

found, lacking = PathFinder.find_spec, set()
PathFinder.find_spec = lambda name, *a: None if name in lacking else found(name, *a)
commands = {
    "keys": ["keys", "new", "--site", "north"],
    "site": ["site", "--data", "x.jsonl", "--store", "s", "--superlink", "127.0.0.1:1"],
    "coordinate": ["coordinate", "tiny/fedavg", "deployment.sites=2"],
}
said = {}
for names in (EXTRAS["flower"], *((name,) for name in EXTRAS["flower"])):
    lacking = {*names}
    for command, arguments in commands.items():
        result = CliRunner().invoke(app, arguments)
        said[f"{command} without {', '.join(names)}"] = result.exit_code, result.stderr
lacking, broken = {name for names in EXTRAS.values() for name in names}, {}
for module in pkgutil.walk_packages(orchard.__path__, "orchard.", onerror=lambda name: None):
    if module.name == "orchard.__main__" or "flower_bundle" in module.name:
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        broken[module.name] = error.name
print(json.dumps({"said": said, "broken": broken}))
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("without"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
def test_every_command_between_sites_names_what_it_lacks(without: dict[str, Any]) -> None:
    assert len(without["said"]) == 15
    for case, (code, text) in without["said"].items():
        command, _, names = case.partition(" without ")
        lines = text.splitlines()
        assert code == 2, case
        assert lines[-1].startswith(f"error: {names} must be installed to "), (command, text)
        assert "pip install '.[flower]'" in lines[-1]
        assert "Traceback" not in text


@pytest.mark.long
def test_only_what_speaks_with_others_needs_an_extra_to_be_imported(
    without: dict[str, Any],
) -> None:
    assert {*without["broken"]} == {
        "orchard.deployment.keys",
        "orchard.deployment.peers",
        "orchard.engine.bell",
        "orchard.engine.bounded_responses",
        "orchard.engine.control",
        "orchard.engine.flower",
        "orchard.engine.flower_messages",
        "orchard.engine.handing_over",
        "orchard.engine.secret_rounds",
        "orchard.engine.secret_sum",
        "orchard.engine.superlink",
        "orchard.engine.supernode",
        "orchard.flower_app",
        "orchard.measurements.flower_peer",
        "orchard.measurements.serving",
        "orchard.measurements.serving_load",
        "orchard.measurements.serving_peer",
        "orchard.measurements.serving_process",
        "orchard.pages.charts",
        "orchard.pages.document",
        "orchard.pages.drawing",
        "orchard.pages.study",
        "orchard.pages.writing",
        "orchard.secure.collector",
        "orchard.secure.masks",
        "orchard.secure.member",
        "orchard.secure.signing",
        "orchard.serving.answering",
        "orchard.serving.connections",
        "orchard.serving.http",
        "orchard.serving.running",
    }
    roots = {name.partition(".")[0] for name in without["broken"].values()}
    assert roots <= {name for names in EXTRAS.values() for name in names}


def test_what_lacks_of_an_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require("flower", to="leave one machine")
    found = importlib.util.find_spec
    for missing in (("httpx",), EXTRAS["flower"]):
        with monkeypatch.context() as patch:
            patch.setattr(
                "importlib.util.find_spec",
                lambda name, gone=missing: None if name in gone else found(name),
            )
            with pytest.raises(
                ValueError, match=f"^{', '.join(missing)} must be installed to leave"
            ):
                require("flower", to="leave one machine")


def test_an_extra_brings_what_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, modules in EXTRAS.items():
        brought = {re.split(r"[^\w-]", line)[0] for line in project["optional-dependencies"][extra]}
        # An extra may also bound what a package of its own brings.
        assert {*modules.values()} <= brought
        assert not brought - {*modules.values()} - {"click"}


def test_every_extra_that_a_command_needs_is_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*EXTRAS} == {*project["optional-dependencies"]} - {"dev", "docs"}
    assert {*TRACKERS} <= {*EXTRAS}


def test_what_was_removed_and_left_its_folder_is_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "removed_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("orchard.extras.EXTRAS", {"mine": {"removed_package": "", "json": ""}})
    assert lacking("mine") == ("removed_package",)


def test_an_import_that_fails_names_the_extra_that_brings_it() -> None:
    said = what_brings(ModuleNotFoundError("No module", name="cryptography.x509"))
    assert said.startswith("cryptography must be installed, got no such package; ")
    assert "extra flower" in said
    assert what_brings(ModuleNotFoundError("No module", name="somebodys")) == ""


CHARTS = ["-c", "from benchmarks.kernels.charts import draw_all; draw_all()"]
CURVES = ["-m", "benchmarks.robustness.run", "--table"]


@pytest.mark.parametrize("script", [CHARTS, pytest.param(CURVES, marks=pytest.mark.long)])
@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="not in a source archive")
def test_a_chart_without_matplotlib_is_refused_in_one_line(
    script: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "found = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda n, *a: None if n == 'matplotlib' else found(n, *a)\n"
    )
    done = subprocess.run(
        [sys.executable, *script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: matplotlib must be installed to draw ")
