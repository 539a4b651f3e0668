"""Small federations for tests: two layers of the packaged tiny model, and a few steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from safetensors.torch import load_file, save_file

from orchard.client.client import Client
from orchard.engine.progress import Silent
from orchard.experiment.methods import METHODS, build_strategy, has_part
from orchard.experiment.preparation import Experiment, prepare_experiment
from orchard.experiment.running import build_clients, load_model, run_experiment
from orchard.models.stored.loading import resolve
from orchard.models.trainable.adapters import AdaptedModel
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.strategies.strategy import Strategy

RECIPES = Path(__file__).parent.parent / "recipes"
QUICK = (
    "client.steps=2",
    "client.batch_size=4",
    "server.rounds=2",
    "evaluation.models=",
    "evaluation.retention_path=",
)
# Every method, and every pair that FLEx makes with another.
COMBINATIONS = [
    *METHODS,
    # Not those with a personal part of another kind, which are refused beside it.
    *(f"flex+{method}" for method in METHODS if method not in ("flex", "ditto", "orchard")),
    "fedprox+scaffold+fedadam+flex",
]
# Every method alone, and beside FLEx one of each part that a method can decide.
SHORT = [
    *METHODS,
    *("flex+fedadam", "flex+hfedmoe", "flex+local", "fedprox+scaffold+fedadam+flex"),
]
NUM_LAYERS = 2  # of the short model, with 8 experts in each
ALL_EXPERTS = 16
QUARTER = 4  # what client.budget=25% affords of them
BUDGETS = (
    "model.lora_targets=q_proj,v_proj,router,experts",
    "client.budget=25%, 100%, 50%, 100%",
)


@cache
def _kept_folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="orchard-short-")


@cache
def short_model() -> str:
    """Return a checkpoint of the packaged model's first layers: it costs half, and still knows."""
    folder = Path(_kept_folder().name)
    tiny = Path(resolve("orchard:tiny"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny / name, folder)
    config = json.loads((tiny / "config.json").read_text())
    config |= {"num_hidden_layers": NUM_LAYERS, "layer_types": config["layer_types"][:NUM_LAYERS]}
    (folder / "config.json").write_text(json.dumps(config))
    dropped = tuple(f"model.layers.{i}." for i in range(NUM_LAYERS, 4))
    tensors = load_file(tiny / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith(dropped)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def quick_recipe(method: str, *overrides: str) -> Recipe:
    """Return a tiny recipe of ``method`` with few steps and no evaluation.

    A method with budgets trains experts and routers too, and two clients of four cannot afford all
    of them.
    """
    own = BUDGETS if has_budget(method) else ()
    if "flex" in method:
        own += ("strategy.calibration_blocks=8",)
    model = f"model.path={short_model()}"
    recipe = read_recipe(
        RECIPES / "tiny" / "flex.toml", [*QUICK, model, f"strategy.name={method}", *own, *overrides]
    )
    return recipe.recipe


def short_first(
    short: Iterable[tuple[Any, ...]], every: Iterable[tuple[Any, ...]]
) -> list[ParameterSet]:
    """Return all cases of a product for ``parametrize``, of which those not in ``short`` are long.

    ``short`` meets every pair of options once, or says beside it what it leaves out.
    """
    chosen = list(short)
    rest = [case for case in every if case not in chosen]
    return [
        *(pytest.param(*case) for case in chosen),
        *(pytest.param(*case, marks=pytest.mark.long) for case in rest),
    ]


def tiny_recipe(method: str, *overrides: str) -> Recipe:
    """Return ``quick_recipe`` on the whole packaged model: four layers of eight experts."""
    return quick_recipe(method, "model.path=orchard:tiny", *overrides)


def has_budget(method: str) -> bool:
    """Say whether a method, or one of several joined, chooses what a budget affords."""
    return has_part(method.split("+"), "budget")


@cache
def prepared(recipe: Recipe) -> Experiment:
    """Return a recipe with its data, made once: nobody changes an experiment."""
    return prepare_experiment(recipe)


def run_quickly(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Run a recipe in ``folder`` without showing progress."""
    return run_experiment(prepared(recipe), folder=folder, reporter=Silent())


def final_tensors(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the last checkpoint and of every client's newest personal tensors."""
    newest = max((folder / "checkpoints").glob("round_*"))
    files = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    for client in (folder / "clients").glob("*"):
        if versions := list(client.glob("round_*.safetensors")):
            files[client.name] = max(versions).read_bytes()
    return files


def build(recipe: Recipe, folder: Path) -> tuple[Strategy, list[Client], AdaptedModel, Experiment]:
    """Return a recipe's strategy, clients and shared model."""
    experiment = prepared(recipe)
    model = load_model(recipe, experiment.tokenizer)
    clients = build_clients(experiment, model, folder)
    return build_strategy(recipe, num_clients=len(clients)), clients, model, experiment
