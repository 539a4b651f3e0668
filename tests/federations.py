"""Small federations for tests: the packaged tiny model, or a random one, with a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchard.client.client import Client
from orchard.engine.progress import Silent
from orchard.experiment.methods import build_strategy, has_part
from orchard.experiment.preparation import Experiment, prepare_experiment
from orchard.experiment.running import build_clients, load_model, run_experiment
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
# Of the 32 experts of the packaged tiny model, 8 in each of 4 layers.
BUDGETS = (
    "model.lora_targets=q_proj,v_proj,router,experts",
    "client.budget=25%, 100%, 50%, 100%",
)


def quick_recipe(method: str, *overrides: str) -> Recipe:
    """Return a tiny recipe of ``method`` with few steps and no evaluation.

    A method with budgets trains experts and routers too, and two clients of four cannot afford all
    of them.
    """
    own = BUDGETS if has_budget(method) else ()
    recipe = read_recipe(
        RECIPES / "tiny" / "flex.toml", [*QUICK, f"strategy.name={method}", *own, *overrides]
    )
    return recipe.recipe


def has_budget(method: str) -> bool:
    """Say whether a method, or one of several joined, chooses what a budget affords."""
    return has_part(method.split("+"), "budget")


def run_quickly(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Run a recipe in ``folder`` without showing progress."""
    return run_experiment(prepare_experiment(recipe), folder=folder, reporter=Silent())


def build(recipe: Recipe, folder: Path) -> tuple[Strategy, list[Client], AdaptedModel, Experiment]:
    """Return a recipe's strategy, clients and shared model."""
    experiment = prepare_experiment(recipe)
    model = load_model(recipe, experiment.tokenizer)
    clients = build_clients(experiment, model, folder)
    return build_strategy(recipe, num_clients=len(clients)), clients, model, experiment
