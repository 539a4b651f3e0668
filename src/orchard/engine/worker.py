"""A process that stays warm beside a SuperNode, and how others on its machine ask it.

A SuperNode hands each message to a worker, which has loaded the model once, over a local socket in
a folder that no other user can enter.

A request and a reply are frames: a JSON header and a body of bytes. This module imports no model
code, because whoever asks must start fast.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from orchard.communication.refusals import Code, known_code

log = logging.getLogger(__name__)
Header: TypeAlias = Mapping[str, Any]
Handle: TypeAlias = Callable[[Header, bytes], tuple[Header, bytes]]
"""From a request's header and body to those of its reply."""

_LENGTHS = struct.Struct(">IQ")
_MAX_HEADER_BYTES = 64 * 2**20
_RETRY_SECONDS = 0.2
_MAX_DEATHS = 10
"""How often one request is given to a worker that dies of it, such as of too little memory."""


class WorkerError(RuntimeError):
    """The worker could not be asked, or its handler raised.

    Attributes:
        code: What may be said of it elsewhere.
    """

    def __init__(self, message: str, *, code: Code = Code.NO_WORKER) -> None:
        """Say what happened, for this machine's log."""
        super().__init__(message)
        self.code = code


def serve(path: Path, handle: Handle, *, until: Callable[[], bool] = lambda: False) -> None:
    """Answer one request after another on a local socket, until ``until`` says so.

    A request whose handler raises is answered with a code; the error is in this process' log, and
    the worker goes on. A connection that breaks is dropped.

    Args:
        path: Of the socket. Its folder is made for this user alone; what is there is replaced.
        handle: Answers a request.
        until: Asked twice a second; True ends the worker.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen()
        server.settimeout(0.5)
        while not until():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(None)
                try:
                    _answer(connection, handle)
                except (OSError, ValueError):
                    continue


def _answer(connection: socket.socket, handle: Handle) -> None:
    header, body = _receive(connection)
    try:
        reply, content = handle(header, body)
    except Exception:
        log.exception("a request could not be handled")
        # What an error says may be what is private here.
        reply, content = {"error": str(Code.FAILED)}, b""
    _send(connection, reply, content)


def ask(
    path: Path,
    header: Header,
    body: bytes,
    *,
    seconds: float,
    max_deaths: int = _MAX_DEATHS,
    is_hopeless: Callable[[], bool] = lambda: False,
) -> tuple[Header, bytes]:
    """Ask the worker behind ``path``, again where it is not there yet or dies while it answers.

    Args:
        path: The worker's socket.
        header: JSON values.
        body: Whatever belongs to it.
        seconds: After so many seconds without an answer this gives up.
        max_deaths: And after so many workers that died of the request.
        is_hopeless: Asked while nobody answers; True gives up.

    Returns:
        The header and body of the reply.

    Raises:
        WorkerError: There was no answer in time, the worker died of the request again and again, or
            the handler raised; then it has the code.
    """
    end, deaths = time.monotonic() + seconds, 0
    while True:
        is_connected = False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(max(end - time.monotonic(), _RETRY_SECONDS))
                connection.connect(str(path))
                is_connected = True
                _send(connection, header, body)
                reply, content = _receive(connection)
                break
        except OSError as error:
            if time.monotonic() >= end:
                raise WorkerError(
                    f"worker must answer within {seconds:g} seconds, got {error}; look at the "
                    "site's log, or raise deployment.round_seconds"
                ) from error
            deaths += is_connected
            if deaths >= max_deaths or is_hopeless():
                raise WorkerError(
                    f"worker must answer, got none that lived through this request in {deaths} "
                    "tries; look at the site's log and its memory"
                ) from error
            time.sleep(_RETRY_SECONDS)
    if "error" in reply:
        code = known_code(str(reply["error"])) or Code.FAILED
        raise WorkerError(str(code), code=code)
    return reply, content


def _send(connection: socket.socket, header: Header, body: bytes) -> None:
    text = json.dumps(header, allow_nan=False).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(body)) + text)
    # The other side answers and closes as soon as it has the lengths that it was told; to send no
    # bytes after that is an error of a request that was answered.
    if body:
        connection.sendall(body)


def _receive(connection: socket.socket) -> tuple[Header, bytes]:
    header_size, body_size = _LENGTHS.unpack(_read(connection, _LENGTHS.size))
    if header_size > _MAX_HEADER_BYTES:
        raise ValueError(
            f"header must have at most {_MAX_HEADER_BYTES} bytes, got {header_size}; "
            "check that both sides run the same version"
        )
    header = json.loads(_read(connection, header_size))
    return header, bytes(_read(connection, body_size))


def _read(connection: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        received = connection.recv_into(view[done:])
        if received == 0:
            raise ConnectionResetError("the connection was closed before the message was complete")
        done += received
    return content


def watches_parent() -> Callable[[], bool]:
    """Return what says whether the process that started this one has gone."""
    parent = os.getppid()
    return lambda: os.getppid() != parent
