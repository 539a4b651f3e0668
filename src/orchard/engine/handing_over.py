"""A message of Flower's, handed to the worker beside its SuperNode."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import RecordDict

from orchard.communication.refusals import Code
from orchard.engine.flower_messages import pack, unpack
from orchard.engine.worker import WorkerError, ask

log = logging.getLogger(__name__)


def answered(records: RecordDict, socket: Path, *, seconds: float) -> RecordDict:
    """Return what the worker behind a socket answers to a message.

    What may be said of a failure is a code: an error's message may hold what is private here.

    Args:
        records: Of the message.
        socket: The worker's.
        seconds: After so many without an answer this gives up.
    """
    try:
        header, body = unpack(records)
        reply, content = ask(socket, header, body, seconds=seconds)
    except WorkerError as error:
        log.warning("%s", error)
        reply, content = {"error": str(error.code)}, b""
    except Exception:
        log.exception("a message could not be handed to the worker")
        reply, content = {"error": str(Code.FAILED)}, b""
    return pack(reply, content)
