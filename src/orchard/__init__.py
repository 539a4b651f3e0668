"""Federated fine-tuning of Mixture-of-Experts language models."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from orchard.moved import MovedFinder

if TYPE_CHECKING:
    from orchard.api import load, load_recipe, plan, run
    from orchard.recipe.options import Recipe
    from orchard.runs import Result, Run

__version__ = "0.1.0"
__all__ = ["Recipe", "Result", "Run", "load", "load_recipe", "plan", "run"]
# Where they are; looked up when asked for, so that a command's help does not wait for them.
_HOMES = {
    **dict.fromkeys(("load", "load_recipe", "plan", "run"), "orchard.api"),
    **dict.fromkeys(("Result", "Run"), "orchard.runs"),
    "Recipe": "orchard.recipe.options",
}

sys.meta_path.append(MovedFinder())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
