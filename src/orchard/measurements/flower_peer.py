"""Flower's own FedAvg on arrays that this package aggregates too: the peer of ``aggregate``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import metadata

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray


def flower_version() -> str:
    """Return the version of the installed ``flwr``."""
    return metadata.version("flwr")


def make_reply(arrays: Mapping[str, NDArray[np.float32]], *, num_examples: float) -> Message:
    """Return what a client's reply with these arrays is once the server has received it."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            "metrics": MetricRecord({"num-examples": num_examples}),
        }
    )
    # Who makes a message must be somebody, which Flower's own processes are from their start.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    return Message(content=content, dst_node_id=1, message_type="train")


def aggregate_replies(replies: Sequence[Message]) -> ArrayRecord:
    """Return the mean by examples, as ``FedAvg.aggregate_train`` makes it.

    Raises:
        ValueError: Flower found nothing to aggregate.
    """
    logging.getLogger("flwr").setLevel(logging.WARNING)
    arrays, _ = FedAvg().aggregate_train(1, replies)
    if arrays is None:
        raise ValueError("replies must hold arrays, got none; make at least one reply")
    return arrays


def to_arrays(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a record."""
    return {name: array.numpy() for name, array in record.items()}
