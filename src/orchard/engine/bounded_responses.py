"""What a server may answer: no more bytes than a limit, counted while they come.

Flower's client reads a whole response before anything looks at it, so whoever is the server decides
how much memory that takes. Here the transport below it counts, and ends the connection at the
limit. A compressed response is not read at all: a few of its bytes may stand for gigabytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from orchard.process_memory import machine_memory_bytes

log = logging.getLogger(__name__)
_LARGEST = 2**31
"""Bytes; a global tree of more values than that holds is beyond what Flower carries."""


def largest_message() -> int:
    """Return how many bytes a site reads of one message: a quarter of its machine at most."""
    memory = machine_memory_bytes()
    return _LARGEST if memory is None else min(_LARGEST, memory // 4)


@contextmanager
def bounded_responses(limit: int) -> Iterator[None]:
    """Bound every response that this process's httpx clients read while the context lasts.

    What is longer, or compressed, ends as an ``httpx.RemoteProtocolError``.

    Args:
        limit: Bytes of a response's body.
    """
    plain = httpx.HTTPTransport.handle_request

    def bounded(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        response = plain(self, request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        if response.headers.get("content-encoding", "identity") != "identity":
            response.stream.close()
            raise _refusal("must not be compressed, got one that is")
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            response.stream.close()
            raise _refusal(f"must have at most {limit} bytes, got {int(length)}")
        response.stream = _Counted(response.stream, limit)
        return response

    # Flower makes its client itself, and takes no transport.
    setattr(httpx.HTTPTransport, "handle_request", bounded)  # noqa: B010
    try:
        yield
    finally:
        setattr(httpx.HTTPTransport, "handle_request", plain)  # noqa: B010


class _Counted(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, limit: int) -> None:
        self._stream, self._limit = stream, limit

    def __iter__(self) -> Iterator[bytes]:
        read = 0
        for part in self._stream:
            read += len(part)
            if read > self._limit:
                raise _refusal(f"must have at most {self._limit} bytes, got more")
            yield part

    def close(self) -> None:
        self._stream.close()


def _refusal(why: str) -> httpx.RemoteProtocolError:
    log.warning("a response of the coordinator %s; it is not read", why)
    return httpx.RemoteProtocolError(f"response {why}; ask the coordinator's owner")
