"""What every placement and precision of frozen experts would need of a machine, and which fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from rich.table import Table

from orchard.client.requirements import Requirements
from orchard.models.stored.placing import KINDS, Placement, check_placement
from orchard.models.stored.precision import PRECISIONS
from orchard.models.trainable.targets import LoraSettings


@dataclass(frozen=True)
class PlacementPlan:
    """What one client in a process of its own needs with its frozen experts in one place.

    Attributes:
        placement: As ``model.placement``.
        precision: As ``model.frozen_precision``.
        predicted_anonymous_bytes: At the peak of training, without pages of files, which the
            system can take back; None where it cannot be had.
        fits: Whether that much is free here; None where the system does not say.
        reason: Why it cannot be had; empty where it can.
    """

    placement: str
    precision: str
    predicted_anonymous_bytes: int | None
    fits: bool | None
    reason: str = ""


def plan_placements(
    requirements: Requirements, lora: LoraSettings, *, budget: int, device: str, free: int | None
) -> tuple[PlacementPlan, ...]:
    """Return what training needs in every placement and precision, in the order of the options.

    Args:
        requirements: Of a recipe whose clients hold all experts.
        lora: What is trained.
        budget: Experts that the largest client trains.
        device: Where the model runs.
        free: Bytes of memory that are free; None = unknown.
    """
    found = []
    for kind, precision in product(KINDS, PRECISIONS):
        placement = Placement(kind, precision=precision)
        try:
            check_placement(placement, lora, device=device)
        except ValueError as error:
            found.append(PlacementPlan(kind, precision, None, False, str(error)))
            continue
        needed = requirements.placed(placement).peak(budget).anonymous
        fits = None if free is None else needed <= free
        found.append(PlacementPlan(kind, precision, needed, fits))
    return tuple(found)


def placements_as_rows(plans: tuple[PlacementPlan, ...]) -> list[dict[str, Any]]:
    """Return them for programs."""
    return [asdict(plan) for plan in plans]


def placements_table(plans: tuple[PlacementPlan, ...], *, free: int | None) -> Table:
    """Return them for people."""
    title = "frozen experts, the largest client"
    if free is not None:
        title += f"; {free / 1e9:.1f} GB of memory are free"
    table = Table("model.placement", "model.frozen_precision", title=title, title_justify="left")
    table.add_column("its own memory", justify="right")
    table.add_column("fits")
    for plan in plans:
        needed = plan.predicted_anonymous_bytes
        fits = "" if plan.fits is None else "yes" if plan.fits else "no"
        shown = "" if needed is None else f"{needed / 1e9:.2f} GB"
        table.add_row(plan.placement, plan.precision, shown, "refused" if plan.reason else fits)
    return table
