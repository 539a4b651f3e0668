"""Real sockets, and real proxies before them: who is behind a proxy is a stranger."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
import uvicorn

from orchard.engine.processes import free_port
from orchard.engine.superlink import FrontDoor, listening, server_of

FLEET, CONTROL = "/v1/fleet/activate-node", "/v1/control/start-run"
DOCUMENT = Path(__file__).parents[2] / "docs" / "how-to" / "behind_a_proxy.md"


async def serve_all(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@contextmanager
def coordinator(*, trusted: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """Serve at a public and an own port, and yield both."""
    sockets = [listening("127.0.0.1", 0), listening("127.0.0.1", 0)]
    public, own = (one.getsockname()[1] for one in sockets)
    door = FrontDoor(serve_all, own_port=own, trusted=tuple(ip_network(one) for one in trusted))
    server = server_of(door, lifespan="off")
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield public, own
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def small_proxy(to: int, *, adds: Sequence[tuple[str, str]]) -> Iterator[int]:
    """Pass every request on, with some headers more, and yield where it listens."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            passed = http.client.HTTPConnection("127.0.0.1", to, timeout=5.0)
            own = {name: value for name, value in self.headers.items() if name != "Connection"}
            passed.request("POST", self.path, b"", {**own, **dict(adds)})
            self.send_response(passed.getresponse().status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            passed.close()

        def log_message(self, *given: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("POST", path, b"", {"Content-Length": "0"})
        return connection.getresponse().status
    finally:
        connection.close()


SAYS_SO = (("X-Forwarded-For", "192.0.2.7"), ("Via", "1.1 proxy"))
LIES = (("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1"))


@pytest.mark.parametrize("adds", [(), SAYS_SO, LIES], ids=["says nothing", "says so", "lies"])
def test_nobody_behind_a_proxy_reaches_the_control_interface(
    adds: Sequence[tuple[str, str]],
) -> None:
    with (
        coordinator(trusted=["127.0.0.1"]) as (public, own),
        small_proxy(public, adds=adds) as proxy,
    ):
        assert status(proxy, CONTROL) == 403
        assert status(proxy, FLEET) == 200
        assert status(public, CONTROL) == 403
        assert status(own, CONTROL) == 200


def test_a_proxy_that_nobody_spoke_of_reaches_nothing() -> None:
    with coordinator() as (public, _), small_proxy(public, adds=SAYS_SO) as proxy:
        assert status(proxy, FLEET) == 403
        assert status(public, FLEET) == 200


def shown(kind: str) -> str:
    """Return the set-up of a proxy that the documentation shows."""
    _, _, rest = DOCUMENT.read_text().partition(f"```{kind}\n")
    return rest.partition("```")[0]


def reached(port: int) -> bool:
    try:
        status(port, FLEET)
    except OSError:
        return False
    return True


def check_proxy(command: Sequence[str], port: int, own: int, *, folder: Path, log: Path) -> None:
    """Start a proxy, and check who gets how far through it."""
    home = {**os.environ, "HOME": str(folder)}
    with (folder / "log").open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, env=home)
    try:
        end = time.monotonic() + 20
        while not reached(port):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        assert status(port, FLEET) == 200
        assert status(port, CONTROL) in (403, 404)
        assert status(own, CONTROL) == 200
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_the_set_up_of_nginx_that_is_shown_lets_sites_in_and_nobody_else(tmp_path: Path) -> None:
    port = free_port()
    with coordinator(trusted=["127.0.0.1"]) as (public, own):
        inner = shown("nginx").replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
        inner = inner.replace("https://127.0.0.1:8443", f"http://127.0.0.1:{public}")
        inner = "".join(line for line in inner.splitlines(True) if "ssl_" not in line)
        room = f"pid {tmp_path}/pid; error_log {tmp_path}/error.log; daemon off;"
        paths = "".join(
            f"{kind}_temp_path {tmp_path}/{kind}; "
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (tmp_path / "nginx.conf").write_text(
            f"{room}\nevents {{}}\nhttp {{ access_log off; {paths}\n{inner}\n}}\n"
        )
        command = ["nginx", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
        check_proxy(command, port, own, folder=tmp_path, log=tmp_path / "error.log")


@pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")
def test_the_set_up_of_caddy_that_is_shown_lets_sites_in_and_nobody_else(tmp_path: Path) -> None:
    port = free_port()
    with coordinator(trusted=["127.0.0.1"]) as (public, own):
        inner = shown("caddy").replace("coordinator.example", f"http://127.0.0.1:{port}")
        inner = inner.replace("https://127.0.0.1:8443", f"http://127.0.0.1:{public}")
        inner = "".join(line for line in inner.splitlines(True) if "tls_" not in line)
        (tmp_path / "Caddyfile").write_text(f"{{\n    admin off\n}}\n{inner}")
        command = [
            "caddy",
            "run",
            "--adapter",
            "caddyfile",
            "--config",
            str(tmp_path / "Caddyfile"),
        ]
        check_proxy(command, port, own, folder=tmp_path, log=tmp_path / "log")


def test_both_set_ups_that_are_shown_say_who_is_behind_them() -> None:
    assert "X-Forwarded-For" in shown("nginx")
    assert "/v1/fleet/" in shown("nginx")
    assert "/v1/fleet/*" in shown("caddy")  # which says it by itself
    assert uvicorn.Config(serve_all).proxy_headers  # what server_of must switch off
    assert not server_of(serve_all).config.proxy_headers
