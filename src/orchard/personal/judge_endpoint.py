"""A question to a judge behind an OpenAI-compatible endpoint, bounded in time, bytes and tries.

The key is read from the environment and goes to that endpoint alone: redirects are not followed,
and over a network that is not encrypted it is not sent.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

KEY_VARIABLE = "ORCHARD_JUDGE_KEY"
_MAX_BYTES = 1 << 20  # a verdict is a line; who sends more is not read
_CHUNK = 1 << 16
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_WORTH_A_RETRY = (408, 409, 425, 429, 500, 502, 503, 504)


class EndpointError(OSError):
    """An endpoint that does not answer, or refuses."""


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Reply(msgspec.Struct):
    choices: list[_Choice]


@dataclass(frozen=True)
class Endpoint:
    """Where judgments are asked for.

    Attributes:
        url: Its base, such as ``http://127.0.0.1:8000/v1``.
        model: The judge's name there.
        timeout_seconds: For one try, from connecting to the last byte.
        retries: Tries after the first, where trying again may help.
        wait_seconds: Before the first of these; twice as long before each that follows.

    Raises:
        ValueError: ``url`` is none, or a key would cross a network in the clear.
    """

    url: str
    model: str
    timeout_seconds: float = 120.0
    retries: int = 3
    wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        """Check where questions would go."""
        parts = urlsplit(self.url)
        try:
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port
        except ValueError:
            is_url = False
        if not is_url or parts.username or parts.query or parts.fragment:
            raise ValueError(
                "--endpoint must be a URL as http://HOST:PORT/v1, got another form; keys go into "
                f"{KEY_VARIABLE}"
            )
        if self.key and parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError(
                f"--endpoint must be https where {KEY_VARIABLE} is set, got http to "
                f"{parts.hostname}; a key is not sent in the clear"
            )

    @property
    def key(self) -> str:
        """The key of the environment; empty = none."""
        return os.environ.get(KEY_VARIABLE, "").strip()

    def ask(self, system: str, user: str) -> str | None:
        """Return what the judge says; None where its response is no message or is too long.

        Raises:
            EndpointError: It does not answer in time and tries, or refuses.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        wait = self.wait_seconds
        for left in range(self.retries, -1, -1):
            try:
                status, content = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {error}"
            else:
                if status == http.HTTPStatus.OK:
                    return _content(content)
                why = f"status {status}"
                if status not in _WORTH_A_RETRY:
                    raise EndpointError(
                        f"--endpoint must answer with a message, got {why}; check its path, the "
                        f"name of the model and {KEY_VARIABLE}"
                    )
            if left:
                time.sleep(wait)
                wait *= 2
        raise EndpointError(
            f"--endpoint must answer within {self.timeout_seconds:g} s, got {why} after "
            f"{self.retries + 1} tries; what was judged is kept, repeat the command to go on"
        )

    def _post(self, body: bytes) -> tuple[int, bytes | None]:
        """Return status and content; None where that is longer than is read."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else None
        connection = (kind or http.client.HTTPConnection)(
            str(parts.hostname), parts.port, timeout=self.timeout_seconds
        )
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        connection.connect()
        own = connection.sock
        # Whoever sends a byte now and then keeps to every timeout of a socket: this ends the whole.
        has_expired = threading.Event()
        ending = threading.Timer(self.timeout_seconds, _shut, (own, has_expired))
        ending.daemon = True
        ending.start()
        try:
            path = f"{parts.path.rstrip('/')}/chat/completions"
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            content = bytearray()
            while chunk := response.read1(_CHUNK):
                content += chunk
                if len(content) > _MAX_BYTES:
                    return response.status, None
            if response.length or has_expired.is_set():
                raise EndpointError("the response ended before its end")
            return response.status, bytes(content)
        finally:
            ending.cancel()
            connection.close()


def _shut(connected: socket.socket, has_expired: threading.Event) -> None:
    has_expired.set()  # before whoever reads sees the end
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself


def _content(content: bytes | None) -> str | None:
    try:
        reply = msgspec.json.decode(content or b"", type=_Reply)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return reply.choices[0].message.content if reply.choices else None
