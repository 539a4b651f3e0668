"""What the data of a run was, kept beside the run, so that it goes on with the same data alone.

Digests and numbers of examples only: nothing of the examples themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from orchard.experiment.holdings import DataDigest
from orchard.results import write_json

DATA_FILE = "data.json"

# How many clients a message names.
_NUM_NAMED = 5


def record_data(folder: Path, digest: DataDigest) -> None:
    """Write down what the data of the run in ``folder`` is."""
    write_json(folder / DATA_FILE, asdict(digest))


def check_data(folder: Path, digest: DataDigest, *, what: str) -> None:
    """Check that a run goes on with the data that it began with.

    Args:
        folder: Where ``record_data`` wrote.
        digest: Of the data as it is now.
        what: The run, in words, for messages.

    Raises:
        ValueError: Nothing is recorded, or the data is another. The message says whose.
    """
    path = folder / DATA_FILE
    if not path.exists():
        raise ValueError(
            f"{path} must say what the data of {what} was, got no such file: an older version "
            "began it; begin anew with another --out"
        )
    try:
        before = DataDigest(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} must say what the data of {what} was, got something else ({error}); bring "
            "back the file, or begin anew with another --out"
        ) from error
    changes = _changes(before, digest)
    if changes:
        raise ValueError(
            f"data must be what it was when {what} began, got other examples: {'; '.join(changes)}"
            "; bring back the data as it was, or begin a new run"
        )


def _changes(before: DataDigest, now: DataDigest) -> list[str]:
    """Return what differs between two records, in words; empty = nothing."""
    if before.overall == now.overall:
        return []
    changes = [
        f"{part} differs"
        for part in {**before.shared, **now.shared}
        if before.shared.get(part) != now.shared.get(part)
    ]
    gone = [client for client in before.own if client not in now.own]
    new = [client for client in now.own if client not in before.own]
    other = [
        f"{client!r} ({_sizes(before.sizes[client], now.sizes[client])})"
        for client, own in now.own.items()
        if before.own.get(client, own) != own
    ]
    for verb, clients in (
        ("changed", other),
        ("is missing", [repr(client) for client in gone]),
        ("is new", [repr(client) for client in new]),
    ):
        if clients:
            more = len(clients) - _NUM_NAMED
            named = ", ".join(clients[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
            changes.append(f"client {named} {verb}")
    return changes or ["the order of clients differs"]


def _sizes(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    def words(sizes: Mapping[str, int]) -> str:
        return f"{sizes['train']} for training and {sizes['test']} for testing"

    if before == now:
        return f"still {words(now)}"
    return f"{words(before)} then, {words(now)} now"
