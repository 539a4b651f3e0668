"""The way between server and client, as stages that encode on one side and decode on the other.

Every message takes the whole way through bytes, also in the simulator: what is counted is the
length of what was sent, and a client trains from what it would have received.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from orchard.communication import messages
from orchard.communication.messages import Task, Update
from orchard.trees import Tree, Widened, map_tree

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Stage(Protocol):
    """One step on the way: ``encode`` at the sender, ``decode`` at the receiver."""

    def encode(self, tree: Tree) -> Tree:
        """Return what is sent for ``tree``."""

    def decode(self, tree: Tree) -> Tree:
        """Return what the receiver takes ``tree`` for."""


@dataclass(frozen=True)
class Cast:
    """Send floating tensors in ``dtype``, receive float32; integers cross as they are.

    Exact for float32. For bfloat16 the error of a value is at most 2^-8 of its size (normal
    numbers, round to nearest even).
    """

    dtype: torch.dtype

    def encode(self, tree: Tree) -> Tree:
        """Cast to ``dtype``."""
        return map_tree(lambda t: t.to(self.dtype) if t.is_floating_point() else t, tree)

    def decode(self, tree: Tree) -> Tree:
        """Cast to float32."""
        return map_tree(lambda t: t.float() if t.is_floating_point() else t, tree)


@dataclass
class Channel:
    """Carries tasks down and updates up, and counts the bytes.

    Attributes:
        stages: Applied in order by the sender and in reverse by the receiver.
        uplink_bytes: Sent by clients since the last ``reset``.
        downlink_bytes: Sent by the server since the last ``reset``.
    """

    stages: tuple[Stage, ...] = ()
    uplink_bytes: int = field(default=0, init=False)
    downlink_bytes: int = field(default=0, init=False)

    def reset(self) -> None:
        """Start counting from zero."""
        self.uplink_bytes = self.downlink_bytes = 0

    def _encode(self, tree: Tree) -> Tree:
        for stage in self.stages:
            tree = stage.encode(tree)
        return tree

    def _decode(self, tree: Tree) -> Tree:
        for stage in reversed(self.stages):
            tree = stage.decode(tree)
        return tree

    def pack_task(self, task: Task) -> bytes:
        """Return ``task`` as the server sends it."""
        return messages.encode_task(replace(task, shared=self._encode(task.shared)))

    def unpack_task(self, message: bytes) -> Task:
        """Return the task that a client reads from ``message``."""
        task = messages.decode_task(message)
        return replace(task, shared=self._decode(task.shared))

    def pack_update(self, update: Update) -> bytes:
        """Return ``update`` as the client sends it."""
        return messages.encode_update(replace(update, delta=self._encode(update.delta)))

    def unpack_update(self, message: bytes | bytearray) -> Update:
        """Return the update that the server reads from ``message``.

        Its tensors are for reading only. Where nothing was done but to cast them, each is widened
        when it is read: who adds one after the other to a sum never holds all of them in float32.
        """
        update = messages.decode_update(message)
        if len(self.stages) == 1 and isinstance(self.stages[0], Cast):
            return replace(update, delta=Widened(update.delta))
        return replace(update, delta=self._decode(update.delta))

    def send_task(self, task: Task) -> Task:
        """Carry ``task`` to a client in this process, through bytes."""
        message = self.pack_task(task)
        self.downlink_bytes += len(message)
        return self.unpack_task(message)

    def send_update(self, update: Update) -> Update:
        """Carry ``update`` to the server in this process, through bytes."""
        message = self.pack_update(update)
        self.uplink_bytes += len(message)
        return self.unpack_update(message)
