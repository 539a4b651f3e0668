"""A step of DP-SGD against a plain one: the same rows, in turn, each with its optimizer's step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from orchard.client.clipping import Clipper
from orchard.client.private_training import private_gradients, train_privately
from orchard.client.training import ExamplePrivacy
from orchard.measurements.step_sides import OurSide, StepCase, read_examples
from orchard.models.view.unbinding import unbound_experts
from orchard.seeding import Seeds, system_normal

TARGETS = ("q_proj", "k_proj", "v_proj", "router", "experts")
SIZES = (4, 16)


def measure_step(model: str | None, data: str | None, *, repeats: int = 5) -> list[dict[str, Any]]:
    """Return the seconds of CPU of a step on the packaged base, and on a model that is given.

    Args:
        model: Another base, or None.
        data: Its rows.
        repeats: Of each way, in turn, after one that is not counted; medians are of these.
    """
    bases = [("orchard:tiny", "", 512), *([(model, data or "", 192)] if model else [])]
    return [
        _measure(path, rows, most, size, repeats) for path, rows, most in bases for size in SIZES
    ]


def _measure(path: str, data: str, max_tokens: int, size: int, repeats: int) -> dict[str, Any]:
    case = StepCase(
        *(path, data), batch_size=size, steps=1, targets=TARGETS, rank=8, max_tokens=max_tokens
    )
    side = OurSide(case)
    rows = read_examples(case, side.model.tokenizer)[:size]
    values = side.model.read(side.model.adapter_names)
    privacy = ExamplePrivacy(noise=1.0, clip=1.0, random="system")
    settings = replace(case.settings, privacy=privacy)

    def private() -> None:
        side.model.load(values)
        train_privately(
            side.model,
            rows,  # as many as a batch has on average: each is in it
            names=side.model.adapter_names,
            settings=settings,
            local=case.local,
            seeds=Seeds(0),
            turn=(1, "a"),
            dropout_seed=0,
        )

    def row_by_row() -> None:
        names = side.model.adapter_names
        side.model.load(values)
        side.model.set_trainable(names)
        leaves = side.model.leaves(names)
        side.model.model.train()
        with unbound_experts(side.model.view):
            clipper = Clipper(side.model, leaves, clip=1.0, is_row_by_row=True)
            private_gradients(
                clipper, leaves, rows, privacy=privacy, expected=float(size), step=0, draw=_noise
            )
        side.model.model.eval()

    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: side.train(rows, values),
        "private": private,
        "row_by_row": row_by_row,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, step in ways.items():
            started = time.process_time()
            step()
            if number:
                seconds[name].append(time.process_time() - started)
    num_tokens = sum(len(row.input_ids) for row in rows)
    return {
        "model": path.rstrip("/").rpartition("/")[2],
        "batch_size": size,
        "num_tokens": num_tokens,
        "cpu_seconds": {name: median(own) for name, own in seconds.items()},
    }


def _noise(name: str, step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(system_normal(shape))
