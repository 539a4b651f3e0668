"""However much a server answers, no more is read than a limit."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from orchard.engine.bounded_responses import bounded_responses, largest_message

LIMIT = 100_000
# Bytes that the endless answer has sent; what sockets hold on the way is some MB at most.
SENT = 0
ON_THE_WAY = 20_000_000


class Answers(BaseHTTPRequestHandler):
    """Answers as its path says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        getattr(self, self.path.strip("/"))()

    def whole(self) -> None:
        self._body(b"x" * LIMIT)

    def longer(self) -> None:
        self._body(b"x" * (LIMIT + 1))

    def claimed(self) -> None:
        self.send_header("Content-Length", str(10**15))
        self.end_headers()

    def compressed(self) -> None:
        self.send_header("Content-Encoding", "gzip")
        self._body(gzip.compress(bytes(10**7)))

    def endless(self) -> None:
        global SENT
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        part = b"x" * 65_536
        try:
            while ON_THE_WAY > SENT:
                self.wfile.write(b"10000\r\n" + part + b"\r\n")
                SENT += len(part)
        except OSError:
            return

    def _body(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_response_within_the_limit_is_read(address: str) -> None:
    with bounded_responses(LIMIT), httpx.Client() as client:
        assert len(client.get(f"{address}/whole").content) == LIMIT


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("longer", "at most 100000 bytes, got 100001"),
        ("claimed", "at most 100000 bytes, got 1000000000000000"),
        ("compressed", "must not be compressed"),
        ("endless", "at most 100000 bytes, got more"),
    ],
)
def test_what_is_longer_or_compressed_is_not_read(address: str, path: str, words: str) -> None:
    with (
        bounded_responses(LIMIT),
        httpx.Client(timeout=10) as client,
        pytest.raises(httpx.RemoteProtocolError, match=words),
    ):
        client.get(f"{address}/{path}")
    assert ON_THE_WAY > SENT


def test_other_clients_read_as_before(address: str) -> None:
    with bounded_responses(10):
        pass
    assert len(httpx.get(f"{address}/longer").content) == LIMIT + 1


def test_a_site_reads_a_quarter_of_its_machine_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "orchard.engine.bounded_responses.machine_memory_bytes"
    monkeypatch.setattr(module, lambda: 4_000_000_000)
    assert largest_message() == 1_000_000_000
    monkeypatch.setattr(module, lambda: None)
    assert largest_message() == 2**31
