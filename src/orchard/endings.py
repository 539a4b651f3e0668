"""What a person should know of how a run went, from its log: in words, and grafts as a record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

_HARDLY = 0.05  # of the loss at the beginning
_PARTS = ("expert", "loss_second", "loss_none", "loss_bound", "loss", "output_norm")
_GRAFT = re.compile(rf"client/graft_({'|'.join(_PARTS)})_(.+?)(?:_(\d+))?")


def graft_record(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what each client grafted in each layer, and what its choice misses.

    Args:
        lines: Of ``metrics.jsonl``.

    Returns:
        Client, layer, then ``experts`` and, where they were compared, the losses by their names.
    """
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] != "client":
            continue
        # Chosen again, as after a crash, the experts are the same.
        chosen: dict[str, dict[str, Any]] = {}
        for key, value in line.items():
            found = _GRAFT.fullmatch(key)
            if found is None:
                continue
            part, layer, place = found.groups()
            if place is not None and part != "expert":
                layer = f"{layer}_{place}"
            own = chosen.setdefault(layer, {"experts": []})
            if part == "expert":
                own["experts"].append(int(value))
            else:
                own[part] = value
        if chosen:
            record[line["client"]] = chosen
    return record


def ending_notes(
    losses: Sequence[float | None],
    grafts: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    learning_rate: float | None,
) -> list[str]:
    """Return sentences on losses that hardly moved, and on grafts worse than none.

    Args:
        losses: Training loss of each round; None where nobody trained.
        grafts: From ``graft_record``.
        learning_rate: Of the first round; None = unknown.
    """
    notes = [_on_loss([loss for loss in losses if loss is not None], learning_rate)]
    layers: dict[str, list[float]] = {}
    for by_layer in grafts.values():
        for layer, own in by_layer.items():
            if own.get("loss", 0.0) > own.get("loss_none", float("inf")):
                layers.setdefault(layer, []).append(own["loss"])
    notes += [
        f"in {layer} the best experts alone miss {max(missed):.2f} of the layer's output, more "
        f"than no expert at all, for {len(missed)} of {len(grafts)} clients; the grafts start as "
        "them all the same"
        for layer, missed in layers.items()
    ]
    return [note for note in notes if note]


def _on_loss(losses: Sequence[float], learning_rate: float | None) -> str:
    """Compare the first quarter of the rounds with the last; one round is noisy."""
    if len(losses) < 2:
        return ""
    part = max(1, len(losses) // 4)
    first, last = fmean(losses[:part]), fmean(losses[-part:])
    moved = f"the training loss went from {first:.2f} to {last:.2f} in {len(losses)} rounds"
    if last > first * (1 + _HARDLY):
        lower = f"client.lr={learning_rate / 4:.1e}" if learning_rate else "a lower client.lr"
        return f"{moved}: it rose; try {lower}"
    if last > first * (1 - _HARDLY):
        higher = f"client.lr={learning_rate * 4:.1e}" if learning_rate else "a higher client.lr"
        return (
            f"{moved}: it hardly moved; try {higher}, server.rounds={3 * len(losses)} or more "
            "client.steps"
        )
    return ""
