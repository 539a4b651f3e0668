"""The cells of the ablation, and which of them are the same by construction."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RANKINGS = ("random", "importance", "information", "cumulative", "specific")
SELECTIONS = ("none", *RANKINGS)
BUDGETS = (25, 50, 78, 100)  # % of all experts
THRESHOLDS = (0.0, 0.5, 1.0, 2.0, 3.2)  # in units of 1/E
AGGREGATIONS = {
    "fedavg": ("all", "examples"),
    "selective": ("usage", "examples"),
    "weighted": ("usage", "preference"),
    "literal": ("usage", "literal"),
}
"""Name to ``selection.experts`` and ``selection.router``."""
TITLES = {
    "fedavg": "FedAvg: all experts are sent, everything counts by examples",
    "selective": "Selective: experts by usage, the router by examples",
    "weighted": "Selective, weighted router: experts by usage, the router by preference",
    "literal": "Literal: experts by usage, the router by Eq. 21 as printed",
}


@dataclass(frozen=True, order=True)
class Cell:
    """One cell of the grid.

    Attributes:
        selection: Of ``SELECTIONS``.
        budget: % of all experts, the same for every client.
        aggregation: Of ``AGGREGATIONS``.
        threshold: Usage from which an expert is sent, in units of 1/E.
    """

    selection: str
    budget: int
    aggregation: str
    threshold: float

    @property
    def name(self) -> str:
        """What its result is called."""
        return f"{self.selection}-{self.budget}-{self.aggregation}-{self.threshold:g}"

    def representative(self) -> Cell:
        """Return the cell that is run for this one.

        Without a selection there is no budget; a budget of 100 % holds the whole union of a batch
        however it is ranked; FedAvg knows no threshold, and one of 0 sends everything, which with
        routers by examples is FedAvg.
        """
        same = self
        if same.selection == "none":
            same = replace(same, budget=100)
        elif same.budget == 100:
            same = replace(same, selection="information")
        if same.aggregation == "fedavg" or (
            same.aggregation == "selective" and same.threshold == 0
        ):
            same = replace(same, aggregation="fedavg", threshold=0.0)
        return same

    def overrides(self) -> tuple[str, ...]:
        """Return the cell as settings of a recipe."""
        experts, router = AGGREGATIONS[self.aggregation]
        return (
            f"selection.rank_by={self.selection}",
            f"selection.threshold={self.threshold}",
            f"selection.experts={experts}",
            f"selection.router={router}",
            f"client.budget={self.budget}%",
        )


def grid() -> list[Cell]:
    """Return every cell, those first that say most, so that an unfinished grid can be read."""
    by_threshold = sorted(THRESHOLDS, key=lambda value: abs(value - 1))
    return [
        Cell(selection, budget, aggregation, threshold)
        for threshold, aggregation, budget, selection in itertools.product(
            by_threshold, AGGREGATIONS, BUDGETS, SELECTIONS
        )
    ]


def distinct() -> list[Cell]:
    """Return the cells that have to be run, in the order of ``grid``."""
    return list(dict.fromkeys(cell.representative() for cell in grid()))


def read_results(folder: Path) -> dict[Cell, dict[str, Any]]:
    """Return the results that are there."""
    found = {cell: folder / f"{cell.name}.json" for cell in distinct()}
    return {cell: json.loads(path.read_text()) for cell, path in found.items() if path.exists()}
