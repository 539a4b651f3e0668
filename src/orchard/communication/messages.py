"""What the server and a client say to each other, and the bytes it becomes.

A message is one safetensors buffer: the tensors as they are (bfloat16 included), everything else
as JSON in the header. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from orchard.communication.buffers import Buffer, join_tensors, view_tensors
from orchard.results import Metrics
from orchard.trees import Tree

_HEADER_KEY = "orchard"

Recode: TypeAlias = Callable[[Tree], Tree]
"""Makes a tree into what is on the wire, or back."""


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains in one round.

    Attributes:
        steps: Optimizer steps; 0 where ``epochs`` rules.
        epochs: Passes over the client's training examples; 0 where ``steps`` rules.
        learning_rate: Learning rate of the whole round.
    """

    steps: int
    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class Task:
    """What the server asks of one client in one round.

    Attributes:
        round_number: From 1; round 0 is the model before training.
        shared: Name to tensor, the global values in play.
        settings: How to train.
        evaluate_local: Whether to evaluate right after local training.
        since: In a message, the digest of the values that those of ``shared`` are differences to;
            empty where they are whole, as they always are once the channel has read them.
    """

    round_number: int
    shared: Tree
    settings: LocalSettings
    evaluate_local: bool = False
    since: str = ""


@dataclass(frozen=True)
class Update:
    """What a client sends back.

    Attributes:
        client_id: Who sends.
        round_number: The round of the task that it answers.
        delta: Name to tensor, local minus global.
        weight: Name to how much it counts, at least 0; the names of ``delta``.
        metrics: Scalars of the client's round.
    """

    client_id: str
    round_number: int
    delta: Tree
    weight: Mapping[str, float]
    metrics: Metrics = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an update in which a name has no weight or a weight no name.

        Raises:
            ValueError: The names differ.
        """
        unpaired = sorted(self.delta.keys() ^ self.weight.keys())
        if unpaired:
            raise ValueError(
                f"weight must have the names of delta, got a difference in {unpaired[0]}; "
                "check the strategy's weigh"
            )


def _pack(tensors: Tree, header: Mapping[str, Any]) -> bytes:
    return join_tensors(tensors, metadata={_HEADER_KEY: json.dumps(header, allow_nan=False)})


def read_header(message: Buffer) -> dict[str, Any]:
    """Return the JSON header of an encoded message, without touching its tensors.

    Raises:
        ValueError: The bytes are not a message of this package.
    """
    return _read_headers(message)[0]


def _read_headers(message: Buffer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what this package and what safetensors wrote about a message."""
    try:
        size = int.from_bytes(message[:8], "little")
        layout = json.loads(bytes(message[8 : 8 + size]))
        content = json.loads(layout.pop("__metadata__")[_HEADER_KEY])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"message must be a safetensors buffer with an orchard header, got {len(message)} "
            "bytes of something else; check that both sides run the same version"
        ) from error
    if not isinstance(content, dict):
        raise ValueError("message header must be a JSON object, got another type; resend it")
    return content, layout


def encode_task(task: Task, *, encode: Recode = dict) -> bytes:
    """Return the bytes of ``task``, with what ``encode`` makes of its values."""
    header = {
        "kind": "task",
        "round_number": task.round_number,
        "settings": asdict(task.settings),
        "evaluate_local": task.evaluate_local,
        "since": task.since,
    }
    return _pack(encode(task.shared), header)


def decode_task(message: Buffer) -> Task:
    """Read a task, with its values as they are on the wire.

    Raises:
        ValueError: The bytes are not a task.
    """
    with _checked_header(message, "task") as (header, layout):
        return Task(
            round_number=int(header["round_number"]),
            # A copy: what a client makes of its task must not reach another's.
            shared=view_tensors(bytearray(message), layout),
            settings=LocalSettings(**header["settings"]),
            evaluate_local=bool(header["evaluate_local"]),
            since=str(header["since"]),
        )


def encode_update(update: Update, *, encode: Recode = dict) -> bytes:
    """Return the bytes of ``update``, with what ``encode`` makes of its delta.

    Raises:
        ValueError: A metric is NaN or infinite.
    """
    for name, value in update.metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"metric {name} must be finite, got {value}; check local training")
    header = {
        "kind": "update",
        "client_id": update.client_id,
        "round_number": update.round_number,
        "weight": dict(update.weight),
        # Of one width, so that a message is as long however long its seconds are.
        "metrics": {name: f"{value:+.16e}" for name, value in update.metrics.items()},
    }
    return _pack(encode(update.delta), header)


def decode_update(message: Buffer, *, decode: Recode = dict) -> Update:
    """Read an update without a copy: its tensors are the message's bytes, for reading only.

    Its delta is what ``decode`` makes of them.

    Raises:
        ValueError: The bytes are not an update.
    """
    with _checked_header(message, "update") as (header, layout):
        return Update(
            client_id=str(header["client_id"]),
            round_number=int(header["round_number"]),
            delta=decode(view_tensors(message, layout)),
            weight={name: float(weight) for name, weight in header["weight"].items()},
            metrics={name: float(value) for name, value in header["metrics"].items()},
        )


@contextmanager
def _checked_header(message: Buffer, kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the headers of a message of this kind; what they lack is an error in the message."""
    header, layout = _read_headers(message)
    if header.get("kind") != kind:
        article = "an" if kind == "update" else "a"
        raise ValueError(
            f"message must be {article} {kind}, got {header.get('kind')}; check who sent it"
        )
    try:
        yield header, layout
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"message header must have every field of its kind, got a {kind} in which {error} is "
            "missing or wrong; check that both sides run the same version"
        ) from error
