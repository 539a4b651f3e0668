from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from federations import quick_recipe, run_quickly
from orchard.trees import digest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(("client.steps=3", "client.batch_size=12", "seed=5"), marks=pytest.mark.long),
    ],
)
def test_fedavg_on_one_page_gives_the_tensors_of_the_engine(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = quick_recipe("fedavg", "server.rounds=3", *overrides)
    result = run_quickly(tmp_path, recipe)
    assert digest(load_example("fedavg_on_one_page").fedavg(recipe)) == result["shared_digest"]


@pytest.mark.long  # its method, by name: tests/experiment/test_own_methods.py
def test_add_a_method_runs() -> None:
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "add_a_method.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.strip()
