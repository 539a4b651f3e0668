"""Whether what a run needs fits where it is to run, told from the planner before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from orchard.client.requirements import PROCESS_BYTES, PeakMemory
from orchard.experiment.planning import Plan, make_plan
from orchard.experiment.workers import WorkerOptions
from orchard.process_memory import available_memory_bytes
from orchard.recipe.options import Recipe

_MAIN_TREES = 4
"""Copies of the global tree in the process that aggregates: the tree, what is sent of it, a sum,
and an update."""


def _plan(recipe: Recipe) -> Plan:
    """Plan what was prepared: its data was encoded then."""
    return make_plan(recipe, encodes=False)


def check_workers(recipe: Recipe, options: WorkerOptions, *, available: int | None = None) -> None:
    """Refuse more workers than this machine's memory has room for, as the planner predicts it.

    Experts that are mapped are not counted: the system keeps what it has room for. Workers on a
    cluster are Ray's to place.

    Args:
        recipe: Every choice.
        options: How many workers.
        available: Bytes that are free; None = as the system says.

    Raises:
        ValueError: They do not fit.
    """
    free = available_memory_bytes() if available is None else available
    if options.number == 1 or options.ray or free is None or recipe.model.device != "cpu":
        return
    peak, mapped = _largest(_plan(recipe))
    each = peak.training if mapped else peak.total
    own = PROCESS_BYTES + _MAIN_TREES * peak.received
    fitting = max((free - own) // each, 0)
    if options.number > fitting:
        rule = f"be in 1..{fitting}" if fitting > 1 else "be 1"
        raise ValueError(
            f"--workers must {rule} ({_size(free)} of memory are free, of which each takes "
            f"{_size(each)} at most and this process {_size(own)}), got {options.number}; lower "
            "it, or what orchard plan shows"
        )


def check_gpu(
    recipe: Recipe, *, free: int | None = None, plan: Callable[[Recipe], Plan] = _plan
) -> None:
    """Refuse a GPU that has too little memory free for the recipe, and say what would fit.

    Args:
        recipe: Every choice.
        free: Bytes that are free on the device; None = it is asked.
        plan: Tells what a recipe needs.

    Raises:
        ValueError: The largest client does not fit.
    """
    device = recipe.model.device
    if not device.startswith("cuda"):
        return
    there = torch.cuda.mem_get_info(device)[0] if free is None else free
    needed = _on_device(plan(recipe))
    if needed <= there:
        return
    for what, smaller in _smaller(recipe):
        if (own := _on_device(plan(smaller))) <= there:
            advice = f"{what} would take {_size(own)}"
            break
    else:
        advice = "no smaller batch fits either: choose a smaller base, or model.device=cpu"
    raise ValueError(
        f"model.device must have {_size(needed)} free for this recipe (predicted), got {device} "
        f"with {_size(there)}; {advice}"
    )


def _smaller(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield recipes that need less, with what is changed in them, the gentlest first."""
    dtypes = ["float32"]
    if recipe.model.dtype == "float32" and not recipe.model.full_targets:
        dtypes.append("bfloat16")
    for dtype in dtypes:
        model = replace(recipe.model, dtype=dtype) if dtype == "bfloat16" else recipe.model
        said = ["model.dtype=bfloat16"] if dtype == "bfloat16" else []
        if said:
            yield said[0], replace(recipe, model=model)
        size, times = recipe.client.batch_size, recipe.client.grad_accumulation
        while size > 1:
            # As many examples in a step, in more and smaller passes.
            size, times = size // 2, times * 2
            client = replace(recipe.client, batch_size=size, grad_accumulation=times)
            parts = [*said, f"client.batch_size={size}", f"client.grad_accumulation={times}"]
            yield " ".join(parts), replace(recipe, model=model, client=client)


def _largest(plan: Plan) -> tuple[PeakMemory, int]:
    peaks = [client.peak for client in plan.clients if client.peak is not None]
    largest = max(peaks, key=lambda peak: peak.total, default=PeakMemory(*[0] * 9))
    return largest, plan.mapped_bytes


def _on_device(plan: Plan) -> int:
    peak, _ = _largest(plan)
    return max(peak.training - peak.process - peak.kernels, 0)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
