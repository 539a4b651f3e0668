"""The way between server and client, as stages that encode on one side and decode on the other.

Every message takes the whole way through bytes, also in the simulator: what is counted is the
length of what was sent, and a client trains from what it would have received.

The server's half is ``broadcast`` and ``unpack_update``, the client's ``unpack_task`` and
``pack_update``. Neither needs anything of the other side but its bytes. What a client keeps for
them between rounds is in ``client/kept_messages.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch

from orchard.communication import messages
from orchard.communication.messages import Task, Update
from orchard.communication.sparsification import TopK
from orchard.communication.stages import RESERVED, Cast, Stage
from orchard.trees import Tree, Widened, digest, select, subtract

_LARGEST = torch.finfo(torch.float32).max

Held: TypeAlias = Callable[[int], Tree | None]
"""Gives the values that a client had before a round."""


class MissingCopyError(ValueError):
    """A task holds differences to values that the client does not have; it needs them whole."""


@dataclass(frozen=True)
class Broadcast:
    """One round's task, the same for all clients.

    Attributes:
        task: With the values to send; on a channel with differences, with those that every client
            has once it has read either message.
        channel: Encodes it.
        held: The values that clients of the round before have; empty where there are none.
        differences: What ``since`` holds, encoded; None where it is the whole message.
    """

    task: Task
    channel: Channel
    held: Tree = field(default_factory=dict)
    differences: Tree | None = None

    @cached_property
    def whole(self) -> bytes:
        """The message for a client that has nothing."""
        return messages.encode_task(self.task, encode=self.channel.downlink_codec.encode)

    @cached_property
    def since(self) -> bytes:
        """The message for a client that has the values of the round before.

        The whole one where there are no differences.
        """
        if self.differences is None:
            return self.whole
        task = replace(self.task, shared=self.differences, since=digest(self.held))
        return messages.encode_task(task)


@dataclass(frozen=True)
class Codec:
    """Stages in order at the sender, in reverse at the receiver; values are finite on both sides.

    Attributes:
        stages: See above.
    """

    stages: tuple[Stage, ...]

    def encode(self, tree: Tree) -> Tree:
        """Return what is sent for ``tree``.

        Raises:
            ValueError: A value is NaN, infinite or beyond float32, or a name is reserved.
        """
        for name in tree:
            if name.startswith(RESERVED):
                raise ValueError(
                    f"name of a tensor must not begin with {RESERVED}, got {name}; rename it"
                )
        _check_finite(tree, "to be sent, got {}; lower client.lr, or check local training")
        for stage in self.stages:
            tree = stage.encode(tree)
        return tree

    def decode(self, tree: Tree) -> Tree:
        """Return what arrives.

        Raises:
            ValueError: ``encode`` makes no such tree.
        """
        for stage in reversed(self.stages):
            tree = stage.decode(tree)
        _check_finite(tree, "in a message, got {}; check who sent it")
        return tree


@dataclass
class Channel:
    """Carries tasks down and updates up, and counts the bytes.

    Attributes:
        uplink: Stages of updates.
        downlink: Stages of tasks with whole values. Encoding what they decoded changes nothing.
        differences: Stages of tasks that hold differences to what the client has; None = all
            tasks hold whole values.
        has_feedback: Whether a client adds to an update what its last ones lost in encoding.
        uplink_bytes: Sent by clients since the last ``reset``.
        downlink_bytes: Sent by the server since the last ``reset``.
    """

    uplink: tuple[Stage, ...] = ()
    downlink: tuple[Stage, ...] = ()
    differences: tuple[Stage, ...] | None = None
    has_feedback: bool = False
    uplink_bytes: int = field(default=0, init=False)
    downlink_bytes: int = field(default=0, init=False)

    @property
    def downlink_codec(self) -> Codec:
        """Encodes whole values."""
        return Codec(self.downlink)

    def reset(self) -> None:
        """Start counting from zero."""
        self.uplink_bytes = self.downlink_bytes = 0

    def broadcast(self, task: Task, held: Tree) -> Broadcast:
        """Return ``task`` as the server sends it to all clients of a round.

        Args:
            task: With the server's values.
            held: ``task.shared`` of the broadcast of the round before; empty where there is none.

        Raises:
            ValueError: A value is not finite.
        """
        if self.differences is None:
            return Broadcast(task, self)
        # What clients with whole values would have is what the others come ever closer to.
        whole = self.downlink_codec
        target = whole.decode(whole.encode(task.shared))
        if not held:
            return Broadcast(replace(task, shared=target), self)
        moved = [name for name in target if not torch.equal(target[name], held[name])]
        codec = Codec(self.differences)
        encoded = codec.encode(subtract(select(target, moved), held))
        shared = _advance(held, codec.decode(encoded), whole)
        return Broadcast(replace(task, shared=shared), self, held, encoded)

    def unpack_task(self, message: bytes, held: Held = lambda before_round: None) -> Task:
        """Return the task that a client reads from ``message``.

        Args:
            message: ``whole`` or ``since`` of a broadcast.
            held: Called with the task's round where the task holds differences; ``shared`` of the
                last task of an earlier round that the client read, None where it has none.

        Raises:
            MissingCopyError: The task holds differences to other values than ``held``.
            ValueError: The bytes are no task of such a channel.
        """
        task = messages.decode_task(message)
        if not task.since:
            return replace(task, shared=self.downlink_codec.decode(task.shared))
        if self.differences is None:
            raise ValueError(
                "task must hold whole values, got differences; check that both sides run the same "
                "recipe"
            )
        before = held(task.round_number)
        if before is None or digest(before) != task.since:
            raise MissingCopyError(
                f"task of round {task.round_number} must follow the values that the client has, "
                f"got differences to {task.since[:12]}, which it has not; send the whole values"
            )
        moves = Codec(self.differences).decode(task.shared)
        for name, move in moves.items():
            if name not in before or move.shape != before[name].shape:
                raise ValueError(
                    f"task must move values that the client has, got {name} of shape "
                    f"{tuple(move.shape)}; check that both sides run the same recipe"
                )
        shared = _advance(before, moves, self.downlink_codec)
        return replace(task, shared=shared, since="")

    def pack_update(self, update: Update) -> bytes:
        """Return ``update`` as the client sends it.

        Raises:
            ValueError: A value or metric is not finite.
        """
        return messages.encode_update(update, encode=Codec(self.uplink).encode)

    def unpack_update(self, message: bytes | bytearray, shared: Tree | None = None) -> Update:
        """Return the update that the server reads from ``message``.

        Args:
            message: As it came.
            shared: The global tree, where the sender may be hostile: what the message claims to
                hold is compared with it before memory is taken for it.

        Its tensors are for reading only. Where nothing was done but to cast them, each is widened
        when it is read: who adds one after the other to a sum never holds all of them in float32.
        Whether such values are finite is for ``server/admission.py`` to look at, where a client
        may be hostile: it costs as much as adding them.

        Raises:
            ValueError: The bytes are no update of such a channel.
        """
        if len(self.uplink) == 1 and isinstance(self.uplink[0], Cast):
            return messages.decode_update(message, decode=Widened)
        stages = self.uplink
        if shared is not None:
            shapes = {name: tuple(tensor.shape) for name, tensor in shared.items()}
            stages = tuple(s.expecting(shapes) if isinstance(s, TopK) else s for s in stages)
        return messages.decode_update(message, decode=Codec(stages).decode)


def _advance(held: Tree, moves: Tree, whole: Codec) -> Tree:
    """Return the values after a round, as a client with whole values would have received them.

    Server and clients do this alike, so that they have the same bits.
    """
    moved = {name: held[name] + move for name, move in moves.items()}
    return {**held, **whole.decode(whole.encode(moved))}


def _check_finite(tree: Tree, rule: str) -> None:
    for name, tensor in tree.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        low, high = (float(value) for value in tensor.detach().aminmax())
        # A comparison with NaN is false.
        if not -_LARGEST <= low <= high <= _LARGEST:
            value = low if not abs(low) <= _LARGEST else high
            raise ValueError(f"{name} must be finite in float32 {rule.format(value)}")
