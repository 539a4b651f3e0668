"""What every placement and precision of frozen experts would need of a machine, and which fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.table import Table

from orchard.client.requirements import Requirements
from orchard.models.stored.placing import KINDS, Placement, check_placement
from orchard.models.stored.precision import PRECISIONS
from orchard.models.trainable.targets import LoraSettings
from orchard.process_memory import available_memory_bytes


@dataclass(frozen=True)
class Free:
    """Bytes of memory that are free; None = unknown.

    Attributes:
        host: Of the machine.
        device: Of the GPU that a recipe names.
    """

    host: int | None
    device: int | None = None

    def holds(self, host: int, device: int) -> bool | None:
        """Say whether both have room; None = unknown."""
        if self.host is None or self.device is None:
            return None
        return host <= self.host and device <= self.device


def find_free(device: str) -> Free:
    """Return what is free on this machine and on a device of it."""
    own = torch.device(device)
    is_there = own.type == "cuda" and torch.cuda.is_available()
    on_device = torch.cuda.mem_get_info(own)[0] if is_there else None
    return Free(available_memory_bytes(), on_device)


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
        predicted_device_bytes: Of the GPU that it runs on, or with ``offload`` would; else None.
            Not measured on a GPU.
    """

    placement: str
    precision: str
    predicted_anonymous_bytes: int | None
    fits: bool | None
    reason: str = ""
    predicted_device_bytes: int | None = None


def plan_placements(
    requirements: Requirements, lora: LoraSettings, *, budget: int, device: str, free: Free
) -> tuple[PlacementPlan, ...]:
    """Return what training needs in every placement and precision, in the order of the options.

    Args:
        requirements: Of a recipe whose clients hold all experts.
        lora: What is trained.
        budget: Experts that the largest client trains.
        device: Where the model runs.
        free: What is free here.
    """
    found = []
    for kind, precision in product(KINDS, PRECISIONS):
        placement = Placement(kind, precision=precision)
        is_on_gpu = device != "cpu" or kind == "offload"
        try:
            # On a CPU as well: what a GPU would need is asked before there is one.
            check_placement(placement, lora, device="cuda" if is_on_gpu else device)
        except ValueError as error:
            found.append(PlacementPlan(kind, precision, None, False, str(error)))
            continue
        peak = requirements.placed(placement).peak(budget)
        if not is_on_gpu:
            needed = peak.anonymous
            fits = None if free.host is None else needed <= free.host
            found.append(PlacementPlan(kind, precision, needed, fits))
            continue
        needed, on_device, reason = peak.host, peak.device, ""
        try:
            check_placement(placement, lora, device=device)
        except ValueError as error:
            reason = str(error)
        fits = False if reason else free.holds(needed, on_device)
        found.append(PlacementPlan(kind, precision, needed, fits, reason, on_device))
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
    table.add_column("on the GPU", justify="right")
    table.add_column("fits")
    for plan in plans:
        fits = "" if plan.fits is None else "yes" if plan.fits else "no"
        table.add_row(
            plan.placement,
            plan.precision,
            _show(plan.predicted_anonymous_bytes),
            _show(plan.predicted_device_bytes),
            "refused" if plan.reason else fits,
        )
    return table


def _show(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"
