"""What evaluation measured of each held-out example, kept by each client: numbers, no text.

A file for each round, beside the client's answers and readable by its owner alone. Nothing here is
ever sent: a coordinator sees means. Studies compare methods example by example from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from orchard.client.store import ClientStore
from orchard.results import write_atomically

FOLDER = "scores"
_OWNER_ALONE = 0o600

ExampleScores: TypeAlias = Mapping[str, Sequence[float]]
"""Metric to a value for each example, in their order; of ``loss`` sums over the example's tokens,
whose numbers are ``num_tokens``."""


def keep_scores(
    store: ClientStore, scores: ExampleScores, *, round_number: int, model: str, of: str
) -> None:
    """Write what one model scored after a round, in the place of what is there.

    Args:
        store: Of the client.
        scores: Of all examples.
        round_number: The completed round; 0 = before training.
        model: ``base``, ``global``, ``local`` or ``personal``.
        of: ``test``, ``retention`` or ``others``, what the examples are.
    """
    path = _path(store.folder, round_number)
    kept = _read(path)
    kept[f"{model}/{of}"] = {metric: [float(v) for v in own] for metric, own in scores.items()}
    write_atomically(path, (json.dumps(kept) + "\n").encode(), mode=_OWNER_ALONE)


def read_scores(
    folder: Path, *, round_number: int, model: str, of: str = "test"
) -> ExampleScores | None:
    """Return what a client kept in its folder of one model after a round; None = nothing."""
    return _read(_path(folder, round_number)).get(f"{model}/{of}")


def _path(folder: Path, round_number: int) -> Path:
    return folder / FOLDER / f"round_{round_number:06d}.json"


def _read(path: Path) -> dict[str, ExampleScores]:
    if not path.exists():
        return {}
    found: dict[str, ExampleScores] = json.loads(path.read_bytes())
    return found
