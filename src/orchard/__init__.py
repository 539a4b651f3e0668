"""Federated fine-tuning of Mixture-of-Experts language models."""

import sys

from orchard.api import load, load_recipe, plan, run
from orchard.moved import MovedFinder
from orchard.recipe.options import Recipe
from orchard.runs import Result, Run

__version__ = "0.1.0"
__all__ = ["Recipe", "Result", "Run", "load", "load_recipe", "plan", "run"]

sys.meta_path.append(MovedFinder())
