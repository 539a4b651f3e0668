"""What is built holds what it takes and no more, and runs where nothing else is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from hatchling.builders.plugin.interface import BuilderInterface
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
MAX_WHEEL_BYTES = 12_000_000


def files_below(folder: Path) -> set[str]:
    """Return the files of a folder of the checkout, without what Python leaves there."""
    return {
        str(path.relative_to(ROOT))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def included(builder: type[BuilderInterface]) -> dict[str, Path]:  # type: ignore[type-arg]
    """Return path in the archive to file of what hatchling would put into it."""
    with (made := builder(str(ROOT))).config.set_build_data({"artifacts": [], "force_include": {}}):
        return {
            file.distribution_path: Path(file.path) for file in made.recurse_included_files()
        } | {
            file.distribution_path: Path(file.path)
            for file in made.recurse_forced_files(made.config.get_force_include())
        }


def test_a_wheel_holds_the_package_and_its_recipes_and_no_more() -> None:
    found = included(WheelBuilder)
    expected = {name.removeprefix("src/") for name in files_below(ROOT / "src" / "orchard")}
    expected |= {f"orchard/{name}" for name in files_below(ROOT / "recipes")}
    assert found.keys() == expected
    assert "orchard/py.typed" in expected
    assert sum(path.stat().st_size for path in found.values()) < MAX_WHEEL_BYTES


def test_a_source_archive_holds_what_make_test_takes_and_no_runs() -> None:
    found = {name.partition("/")[0] for name in included(SdistBuilder)}
    assert found == {
        *("src", "recipes", "tests", "examples", "docs", "scripts"),
        *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md"),
        *("constraints.txt", "pyproject.toml"),
    }


def call(*command: object, here: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command where nothing of this checkout may be found by accident."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=here,
        env={**kept, "COLUMNS": "250"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def required(name: str, found: dict[str, Distribution]) -> dict[str, Distribution]:
    """Add to ``found`` what a distribution requires without extras, and what that does."""
    own = distribution(name)
    found[name] = own
    for text in own.requires or ():
        one = Requirement(text)
        needed = canonicalize_name(one.name)
        if needed in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        assert not one.extras, f"{name} requires {one}: an extra of it is not followed here"
        required(needed, found)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    call(*build, here=folder)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        roots = {name.partition("/")[0] for name in archive.namelist()}
        assert roots == {"orchard", "orchard_moe-0.1.0.dist-info"}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "constraints.txt", "tests/test_packaging.py"} <= names
    return wheel


@pytest.mark.long
def test_the_wheel_runs_beside_what_it_requires_and_nothing_else(
    wheel: Path, tmp_path: Path
) -> None:
    environment, here = tmp_path / "environment", tmp_path / "here"
    here.mkdir()
    call(sys.executable, "-m", "venv", "--without-pip", environment, here=here)
    (packages,) = environment.glob("lib/python*/site-packages")
    others = required("orchard-moe", {})
    del others["orchard-moe"]
    for one in others.values():
        top = {file.parts[0] for file in one.files or () if ".." not in file.parts}
        for part in top - {"__pycache__"}:
            if not (packages / part).exists():
                (packages / part).symlink_to(one.locate_file(part))
    assert not {"flwr", "cryptography", "matplotlib", "pytest"} & others.keys()
    install = (sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install")
    call(*install, "--quiet", "--no-deps", "--no-index", "--no-compile", wheel, here=here)
    check_commands(environment / "bin" / "orchard", here)


@pytest.mark.exhaustive
def test_the_wheel_runs_where_pip_installs_it_and_so_does_its_demo(
    wheel: Path, tmp_path: Path
) -> None:
    environment, here = tmp_path / "environment", tmp_path / "here"
    here.mkdir()
    call(sys.executable, "-m", "venv", environment, here=here)
    pip = environment / "bin" / "pip", "install", "--quiet", "--no-compile"
    pip = (*pip, "-c", ROOT / "constraints.txt")
    call(*pip, "torch", here=here)
    call(*pip, wheel, here=here)
    installed = call(environment / "bin" / "pip", "freeze", here=here).stdout.lower()
    for name in ("flwr", "cryptography", "matplotlib", "pytest"):
        assert f"\n{name}==" not in installed
    orchard = environment / "bin" / "orchard"
    check_commands(orchard, here)
    assert "everything is in runs/demo" in call(orchard, "demo", here=here).stdout
    assert (here / "runs" / "demo" / "summary.json").is_file()


def check_commands(orchard: Path, here: Path) -> None:
    """Check that commands work, and that those which take an extra say so."""
    assert "tiny/flex " in call(orchard, "ls", here=here).stdout
    assert "32 experts in 4 MoE layers" in call(orchard, "plan", "tiny/flex", here=here).stdout
    short = ("server.rounds=1", "client.steps=1", "evaluation.models=global")
    call(orchard, "run", "tiny/fedavg", *short, "--out", "run", here=here)
    result = json.loads((here / "run" / "result.json").read_text())
    assert result["commit"] is None
    assert result["base_is_unchanged"]
    for command in (
        ("keys", "new", "--site", "north"),
        ("coordinate", "tiny/fedavg", "deployment.sites=2"),
        ("site", "--data", "x.jsonl", "--store", "s", "--superlink", "127.0.0.1:1"),
    ):
        (line,) = call(orchard, *command, here=here, code=2).stderr.splitlines()
        assert line.startswith("error: flwr, cryptography, ")
