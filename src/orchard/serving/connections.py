"""Connections of strangers: how many, how long they may be silent, and how long a head may be."""

from __future__ import annotations

import asyncio
import ipaddress

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request's line and headers."""

# Fewer than the 1,024 files that most systems let a process have open, so that models can be read
# whoever is connected.
_MAX_CONNECTIONS = 512
_HEAD_SECONDS = 15.0


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 whose requests must begin soon, over so many connections and no more.

    A connection past the last one is closed at once. One whose request's head does not come whole
    in time is closed too, whether as the first or after others. How long a body may take is up to
    who reads it.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it."""
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()
            return
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Read what comes."""
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()
        elif not self.transport.is_closing():
            self._wait_for_head()

    def on_response_complete(self) -> None:
        """Go on to what was sent behind a request."""
        super().on_response_complete()
        if self.conn.trailing_data[0] and not self._is_answering():
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self._is_answering():
            self.transport.close()


def is_loopback(host: str) -> bool:
    """Say whether a name or an address is one that a machine has for itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
