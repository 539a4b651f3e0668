"""What the server and a client say to each other, and the bytes it becomes.

A message is one safetensors buffer: the tensors as they are (bfloat16 included), everything else
as JSON in the header. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias, TypeVar

from orchard.communication import door
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


_Header = TypeVar("_Header", door.TaskHeader, door.UpdateHeader)


def _pack(tensors: Tree, header: str) -> bytes:
    return join_tensors(tensors, metadata={_HEADER_KEY: header})


def read_update_header(message: Buffer) -> door.UpdateHeader:
    """Return what an encoded update says of itself, without touching its tensors.

    Raises:
        ValueError: The bytes are no update.
    """
    return _read_headers(message, "update", door.UpdateHeader)[0]


def _read_headers(
    message: Buffer, kind: str, header_type: type[_Header]
) -> tuple[_Header, dict[str, Any]]:
    """Return what this package and what safetensors wrote about a message of this kind."""
    try:
        layout = door.read_layout(message)
        text = layout.pop("__metadata__")[_HEADER_KEY]
        if not isinstance(text, str):
            raise TypeError(_HEADER_KEY)
        found = door.kind_of(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"message must be a safetensors buffer with an orchard header, got {len(message)} "
            f"bytes of something else ({error}); check that both sides run the same version"
        ) from error
    article = "an" if kind == "update" else "a"
    if found != kind:
        raise ValueError(f"message must be {article} {kind}, got {found}; check who sent it")
    try:
        return door.read_message_header(text, header_type), layout
    except door.MalformedError as error:
        raise ValueError(
            f"message header must have every field of its kind, got {article} {kind} in which one "
            f"is missing or wrong ({error})"
        ) from error


def encode_task(task: Task, *, encode: Recode = dict) -> bytes:
    """Return the bytes of ``task``, with what ``encode`` makes of its values."""
    header = {
        "kind": "task",
        "round_number": task.round_number,
        "settings": asdict(task.settings),
        "evaluate_local": task.evaluate_local,
        "since": task.since,
    }
    return _pack(encode(task.shared), json.dumps(header, allow_nan=False))


def decode_task(message: Buffer) -> Task:
    """Read a task, with its values as they are on the wire.

    Raises:
        ValueError: The bytes are not a task.
    """
    header, layout = _read_headers(message, "task", door.TaskHeader)
    own = header.settings
    return Task(
        round_number=header.round_number,
        # A copy: what a client makes of its task must not reach another's.
        shared=view_tensors(bytearray(message), layout),
        settings=LocalSettings(own.steps, own.epochs, own.learning_rate),
        evaluate_local=header.evaluate_local,
        since=header.since,
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
        "metrics": {},
    }
    # Numbers of one width, so that a message is as long however long its seconds are.
    metrics = ", ".join(f"{json.dumps(n)}: {v:>27.16e}" for n, v in update.metrics.items())
    text = json.dumps(header, allow_nan=False)
    assert text.endswith("{}}")
    return _pack(encode(update.delta), f"{text[:-3]}{{{metrics}}}}}")


def decode_update(message: Buffer, *, decode: Recode = dict) -> Update:
    """Read an update without a copy: its tensors are the message's bytes, for reading only.

    Its delta is what ``decode`` makes of them.

    Raises:
        ValueError: The bytes are not an update.
    """
    header, layout = _read_headers(message, "update", door.UpdateHeader)
    return Update(
        client_id=header.client_id,
        round_number=header.round_number,
        delta=decode(view_tensors(message, layout)),
        weight=header.weight,
        metrics=header.metrics,
    )
