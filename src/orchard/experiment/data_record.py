"""What the data of a run was, kept beside the run, so that it goes on with the same data alone.

Digests and numbers of examples only: nothing of the examples themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path

from orchard.data.examples import Example
from orchard.experiment.holdings import Federation
from orchard.results import write_json

DATA_FILE = "data.json"

# How many clients a message names.
_NUM_NAMED = 5


@dataclass(frozen=True)
class DataDigest:
    """What the data of a run was, without the data.

    Attributes:
        overall: SHA-256 over all clients, in their order.
        clients: Client id to SHA-256 over what that client holds.
        own: Client id to SHA-256 over its own training and test examples alone.
        shared: What all clients hold, by the option that names it, to its SHA-256.
        sizes: Client id to the numbers of its ``train`` and ``test`` examples.
        test: SHA-256 of what models are measured on: all clients' test examples, and retention.
    """

    overall: str
    clients: Mapping[str, str]
    own: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    test: str = ""


def data_digest(
    federation: Federation,
    *,
    retention: Sequence[Example] = (),
    calibration: Sequence[Example] = (),
) -> DataDigest:
    """Return the digest of what every client holds: the same one means the same data.

    A client's is over its training examples, its test examples, and the examples of retention and
    calibration that all clients hold: every field of every example, as text, in order. How they are
    encoded for a model is the recipe's, and not in it.

    Args:
        federation: Who holds which examples.
        retention: See ``read_elsewhere``.
        calibration: See ``read_elsewhere``.
    """
    known: dict[int, str] = {}

    def of(examples: Sequence[Example]) -> str:
        # A central test set is one list for all clients, and is read once.
        if id(examples) not in known:
            found = hashlib.sha256()
            for example in examples:
                found.update(json.dumps(astuple(example)).encode() + b"\n")
            known[id(examples)] = found.hexdigest()
        return known[id(examples)]

    clients, own, sizes = {}, {}, {}
    for client, train in federation.train.items():
        test = federation.test[client]
        clients[client] = _sha256(*map(of, (train, test, retention, calibration)))
        own[client] = _sha256(of(train), of(test))
        sizes[client] = {"train": len(train), "test": len(test)}
    return DataDigest(
        overall=_sha256(*(part for item in clients.items() for part in item)),
        clients=clients,
        own=own,
        shared={
            "evaluation.retention_path": of(retention),
            "strategy.calibration_path": of(calibration),
        },
        sizes=sizes,
        test=_sha256(
            *(part for client in own for part in (client, of(federation.test[client]))),
            of(retention),
        ),
    )


def _sha256(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


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
    for what, clients in (
        ("changed", other),
        ("missing", [repr(client) for client in gone]),
        ("new", [repr(client) for client in new]),
    ):
        if clients:
            more = len(clients) - _NUM_NAMED
            named = ", ".join(clients[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")
            changes.append(f"{what}: {named}")
    return changes or ["the order of clients differs"]


def _sizes(before: Mapping[str, int], now: Mapping[str, int]) -> str:
    def words(sizes: Mapping[str, int]) -> str:
        return f"{sizes['train']} for training and {sizes['test']} for testing"

    if before == now:
        return f"still {words(now)}"
    return f"{words(before)} then, {words(now)} now"
