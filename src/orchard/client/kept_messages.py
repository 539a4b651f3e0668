"""What a client keeps of its messages: the values that it was sent, and what it could not send.

Both live in stores of their own on its disk, by round as personal tensors do, so that a round that
is run again reads what it read before. What could not be sent derives from the client's data and
is in no message but the updates that it is added to.
"""

from __future__ import annotations

from dataclasses import replace

from orchard.client.store import ClientStore, Personal
from orchard.communication.channel import Channel
from orchard.communication.messages import Task, Update
from orchard.trees import Tree

HELD, _RESIDUAL = "held", "residual"


def read_task(message: bytes, channel: Channel, store: ClientStore) -> Task:
    """Return the task in ``message``; where differences may follow, keep its values.

    Raises:
        MissingCopyError: It holds differences to values that are not in the store; the client must
            be sent the whole task.
        ValueError: The bytes are no task.
    """
    if channel.differences is None:
        return channel.unpack_task(message)
    own = store.beside(HELD)

    def held(before_round: int) -> Tree | None:
        kept = own.load(before_round=before_round)
        return kept.tensors if kept else None

    task = channel.unpack_task(message, held)
    own.save(Personal(task.shared), round_number=task.round_number)
    return task


def keep_values(task: Task, channel: Channel, store: ClientStore) -> None:
    """Keep the values of a task that was read, where ``read_task`` has not."""
    if channel.differences is None:
        own = replace(store.beside(HELD), keep_rounds=store.keep_rounds)
        own.save(Personal(task.shared), round_number=task.round_number)


def write_update(update: Update, channel: Channel, store: ClientStore) -> bytes:
    """Return ``update`` as it is sent; where there is feedback, with what earlier ones lost.

    The client decodes its own message as the server will and keeps the difference to what it meant
    to send. A name that is not sent keeps its residual: it is part of what the client learned, and
    is added when the name is sent again. A residual is in the unit of the delta, so it counts by
    the weight of the update that it goes with.

    Source: error feedback as in Karimireddy et al., 2019, arXiv:1901.09847, on deltas.

    Raises:
        ValueError: A value is not finite.
    """
    if not channel.has_feedback or not update.delta:
        return channel.pack_update(update)
    own = store.beside(_RESIDUAL)
    kept = own.load(before_round=update.round_number)
    residual = dict(kept.tensors) if kept else {}
    floating = {name: t for name, t in update.delta.items() if t.is_floating_point()}
    wanted = {
        name: tensor.float() + residual[name] if name in residual else tensor.float()
        for name, tensor in floating.items()
    }
    message = channel.pack_update(replace(update, delta={**update.delta, **wanted}))
    received = channel.unpack_update(message).delta
    residual |= {name: wanted[name] - received[name] for name in wanted}
    own.save(Personal(residual), round_number=update.round_number)
    return message
