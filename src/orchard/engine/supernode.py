"""A SuperNode that hands every message to the worker beside it, in its own process.

Flower's SuperNode looks for messages every 3 seconds, serves an interface to processes of its own,
and starts one for every message, which loads the app that the coordinator sent. This one does none
of that: it asks, the SuperLink's front door holds the question until there is a message
(``bell.py``), and the worker answers over its local socket. Nothing that a coordinator sends is
run.

Run as ``python -m orchard.engine.supernode`` by ``orchard site``.
"""

from __future__ import annotations

import argparse
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_object_contents_from_iterable,
)
from flwr.supernode.fleet_http_connection import http_request_response

from orchard.engine.bounded_responses import bounded_responses, largest_message
from orchard.engine.handing_over import answered
from orchard.engine.processes import leaves_on_termination

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.3
"""Between questions, where nobody holds them: a coordinator of an older version."""
_FIRST_BACKOFF, _MOST_BACKOFF = 0.05, 1.0
"""A message is announced before all of it has come to the SuperLink."""


def main() -> None:
    """Take part until stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Every request that httpx makes is a line at this level.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--patience-seconds", type=float, required=True)
    parser.add_argument("--root-certificates", type=Path)
    parser.add_argument("--private-key", type=Path)
    parser.add_argument("--insecure", action="store_true")
    given = parser.parse_args()
    certificates = given.root_certificates.read_bytes() if given.root_certificates else None
    keys = read_keys(given.private_key) if given.private_key else None
    limit = largest_message()
    with (
        leaves_on_termination(),
        bounded_responses(limit),
        http_request_response(given.superlink, given.insecure, certificates, keys) as connection,
    ):
        log.info("SuperNode ID: %s", connection[0])
        while True:
            started = time.monotonic()
            if not take_one(
                connection,
                given.socket,
                seconds=given.patience_seconds,
                limit=limit,
            ):
                time.sleep(max(_LOOK_SECONDS - (time.monotonic() - started), 0.0))


def read_keys(path: Path) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """Return a site's private key and its public one.

    Raises:
        ValueError: It is no key on an elliptic curve.
    """
    private = load_ssh_private_key(path.read_bytes(), None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} must be a key on an elliptic curve, got another; make a new one")
    return private, private.public_key()


def take_one(
    connection: tuple[Any, ...], socket: Path, *, seconds: float, limit: int = 2**31
) -> bool:
    """Answer one message, and say whether there was one.

    One that cannot be read is dropped: the coordinator probes whoever does not answer, and asks
    again.

    Args:
        connection: Flower's calls.
        socket: Of the worker.
        seconds: The worker has for an answer.
        limit: Bytes of all objects of a message.
    """
    _, receive, send, _, _, pull_object, push_object, confirm = connection
    received = receive()
    if received is None:
        return False
    announced, tree = received
    run_id = announced.metadata.run_id
    started, room = time.monotonic(), _Room(limit)
    try:
        message = pull_and_inflate_object_from_tree(
            tree,
            lambda object_id: room.take(cast(bytes, pull_object(run_id, object_id))),
            lambda object_id: confirm(run_id, object_id),
            return_type=Message,
            initial_backoff=_FIRST_BACKOFF,
            backoff_cap=_MOST_BACKOFF,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        reply = Message(answered(message.content, socket, seconds=seconds), reply_to=message)
        del message
        _give_back(reply, send, push_object, seconds=time.monotonic() - started)
    except Exception:
        log.exception("a message of run %s could not be answered", run_id)
    return True


class _Room:
    """What the objects of one message may take together; several are pulled at a time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken, self._lock = limit, 0, threading.Lock()

    def take(self, content: bytes) -> bytes:
        with self._lock:
            self._taken += len(content)
            if self._taken > self._limit:
                raise ValueError(f"message must have at most {self._limit} bytes, got more")
        return content


def _give_back(
    reply: Message,
    send: Callable[..., tuple[set[str], str]],
    push_object: Callable[[int, str, str, bytes], None],
    *,
    seconds: float,
) -> None:
    reply.metadata.__dict__["_message_id"] = reply.object_id
    run_id = reply.metadata.run_id
    with no_object_id_recompute():
        wanted, session = send(reply, get_object_tree(reply), seconds)
        objects = get_all_nested_objects(reply)
        push_object_contents_from_iterable(
            ((name, objects[name].deflate()) for name in objects if name in wanted),
            lambda name, content: push_object(run_id, session, name, content),
        )


if __name__ == "__main__":
    main()
