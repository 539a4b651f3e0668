from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any

import pytest

pytest.importorskip("flwr")
from orchard.engine.superlink import MAX_BODY_BYTES, FrontDoor, clock_skew, listening

OUTSIDE, HERE = "192.0.2.7", "127.0.0.1"
PUBLIC_PORT, OWN_PORT = 8443, 50001
FLEET, CONTROL = "/v1/fleet/activate-node", "/v1/control/start-run"


async def serve_all(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def status(
    host: str,
    path: str,
    *,
    server: tuple[Any, ...] | None = (HERE, PUBLIC_PORT),
    headers: Sequence[tuple[bytes, bytes]] = (),
    trusted: Sequence[str] = (),
) -> int:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "client": (host, 5), "server": server}
    networks = tuple(ip_network(one) for one in trusted)
    door = FrontDoor(serve_all, own_port=OWN_PORT, trusted=networks)
    asyncio.run(door({**scope, "headers": list(headers)}, None, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize("host", [OUTSIDE, HERE, "::1", "::ffff:127.0.0.1", "", "nonsense"])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (FLEET, 200),
        ("/v1/control/register-node", 403),
        (CONTROL, 403),
        ("/v1/runtime/get-nodes", 403),
        ("/docs", 403),
        ("/", 403),
        ("/v1/fleet/../control/start-run", 403),
        ("//v1/fleet/x", 403),
        ("/v1/fleet//x", 403),
    ],
)
def test_at_the_public_port_anybody_reaches_the_fleet_alone(
    path: str, expected: int, host: str
) -> None:
    assert status(host, path) == expected
    # Which port it is stands in the socket: nobody can say it.
    assert status(host, path, server=(OUTSIDE, OWN_PORT)) == expected
    assert status(host, path, server=None) == expected


def test_this_machines_own_processes_reach_everything_at_their_own_port() -> None:
    for path in (FLEET, CONTROL, "/v1/runtime/get-nodes"):
        assert status(HERE, path, server=(HERE, OWN_PORT)) == 200


@pytest.mark.parametrize(
    "name",
    [
        *("Forwarded", "X-Forwarded-For", "x-forwarded-proto", "X-Forwarded-Anything", "Via"),
        *("X-Real-IP", "CF-Connecting-IP", "True-Client-IP", "X-Client-IP"),
    ],
)
def test_a_forwarded_request_is_refused_but_from_a_trusted_proxy(name: str) -> None:
    headers = [(b"host", b"coordinator"), (name.encode(), b"127.0.0.1")]
    assert status(HERE, FLEET, headers=headers) == 403
    assert status(HERE, CONTROL, headers=headers, server=(HERE, OWN_PORT)) == 403
    assert status(HERE, FLEET, headers=headers, trusted=["127.0.0.1"]) == 200
    assert status("10.0.0.9", FLEET, headers=headers, trusted=["10.0.0.0/24"]) == 200
    assert status("10.0.1.9", FLEET, headers=headers, trusted=["10.0.0.0/24"]) == 403
    # Trust is about who is behind it, and opens nothing.
    assert status(HERE, CONTROL, headers=headers, trusted=["127.0.0.1"]) == 403
    own = (HERE, OWN_PORT)
    assert status(HERE, CONTROL, headers=headers, trusted=["127.0.0.1"], server=own) == 403


NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "is_refused"), [(0, False), (4, False), (10, True), (-300, False), (-400, True)]
)
def test_a_clock_that_is_too_far_off_is_told(seconds: int, is_refused: bool) -> None:
    signed_at = (NOW + timedelta(seconds=seconds)).isoformat()
    assert clock_skew(signed_at, now=NOW) == (seconds if is_refused else None)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-11-25T12:00:00", "9" * 10_000])
def test_what_is_no_time_is_not_told(text: str) -> None:
    assert clock_skew(text, now=NOW) is None


def test_the_log_says_why_a_site_is_not_let_in(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        return None

    signed_at = (datetime.now(UTC) + timedelta(seconds=10)).isoformat().encode()
    scope = {
        "type": "http",
        "path": "/v1/fleet/activate-node",
        "client": (OUTSIDE, 5),
        "headers": [(b"flwr-timestamp", signed_at)],
    }
    door = FrontDoor(app, own_port=OWN_PORT)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # it says so once a minute
            asyncio.run(door(scope, None, None))
    (told,) = caplog.messages
    assert f"a site at {OUTSIDE} is not let in: its clock is 10 seconds ahead of" in told


def test_a_socket_for_every_address_is_reached_in_either_family() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with listening("::", 0) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=5.0).close()


@pytest.mark.parametrize("said", [b"%d" % (MAX_BODY_BYTES + 1), b"9" * 30, b"-1", b"1e3", b""])
def test_a_body_that_says_it_is_too_long_is_not_read(said: bytes) -> None:
    assert status(OUTSIDE, FLEET, headers=[(b"content-length", said)]) == 413
    assert status(OUTSIDE, FLEET, headers=[(b"content-length", b"%d" % MAX_BODY_BYTES)]) == 200
    # This machine's own processes hand out the app and what is sent.
    own = (HERE, OWN_PORT)
    assert status(HERE, FLEET, server=own, headers=[(b"content-length", said)]) == 200


@pytest.mark.parametrize(("number", "is_whole"), [(64, True), (65, False), (10_000, False)])
def test_a_body_that_does_not_say_so_is_read_up_to_a_bound(number: int, is_whole: bool) -> None:
    """Flower reads a body into memory before it looks at who sent it."""
    taken: list[dict[str, Any]] = []
    sent = iter(range(number))

    async def read_all(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            taken.append(message)

    async def receive() -> dict[str, Any]:
        last = next(sent) == number - 1
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": not last}

    scope = {"type": "http", "path": FLEET, "client": (OUTSIDE, 5), "server": (HERE, PUBLIC_PORT)}
    door = FrontDoor(read_all, own_port=OWN_PORT)
    asyncio.run(door({**scope, "headers": []}, receive, None))
    assert len(taken) == (number - 1 if is_whole else 64)
