"""What a method is to those that it joins: which part it decides, and how it is put on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orchard.recipe.options import Recipe
from orchard.strategies.strategy import Strategy

PARTS = ("server", "objective", "budget", "experts", "own", "control", "private", "sharing")
"""In the order in which methods are put together, whatever the order of their names.

A plain function of one's own is ``own``: it sees what clients train and send under all that choose
experts, and control variates and Local see what it makes of that.
"""


@dataclass(frozen=True)
class Method:
    """One method that ``strategy.name`` can name.

    Attributes:
        about: One line for people.
        source: The paper.
        part: What it decides, of ``PARTS``: ``server`` (one at most), ``objective``, ``budget``
            (one at most), ``experts``, ``own`` (anything), ``control``, ``private`` (one at most)
            or ``sharing``.
        apply: Makes a strategy into one with the method in it, given the recipe and the number of
            clients.
    """

    about: str
    source: str
    part: str
    apply: Callable[[Strategy, Recipe, int], Strategy]

    def __post_init__(self) -> None:
        """Check the part.

        Raises:
            ValueError: There is no such part.
        """
        if self.part not in PARTS:
            raise ValueError(f"part must be of {', '.join(PARTS)}, got {self.part}; choose one")
