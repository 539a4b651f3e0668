from __future__ import annotations

import asyncio
import logging
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

pytest.importorskip("flwr")
from orchard.engine.superlink import FleetOnly, clock_skew, listening

OUTSIDE, HERE = "192.0.2.7", "127.0.0.1"


def status(host: str, path: str, server: str = "192.0.2.1") -> int:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "client": (host, 5), "server": (server, 8443)}
    asyncio.run(FleetOnly(app)(scope, None, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/fleet/activate-node", 200),
        ("/v1/control/register-node", 403),
        ("/v1/control/start-run", 403),
        ("/v1/runtime/get-nodes", 403),
        ("/docs", 403),
        ("/", 403),
        ("/v1/fleet/../control/start-run", 403),
        ("//v1/fleet/x", 403),
        ("/v1/fleet//x", 403),
    ],
)
def test_other_machines_reach_the_fleet_alone(path: str, expected: int) -> None:
    assert status(OUTSIDE, path) == expected
    assert status(HERE, path) == 200


@pytest.mark.parametrize("host", ["", "nonsense", "::ffff:192.0.2.7"])
def test_who_cannot_be_told_is_a_stranger(host: str) -> None:
    assert status(host, "/v1/control/start-run") == 403


def test_who_calls_from_the_address_that_is_called_is_this_machine() -> None:
    assert status("192.0.2.1", "/v1/control/start-run", server="192.0.2.1") == 200
    assert status("192.0.2.7", "/v1/control/start-run", server="192.0.2.1") == 403
    assert status("", "/v1/control/start-run", server="") == 403


@pytest.mark.parametrize("host", ["::ffff:127.0.0.1", "::1"])
def test_this_machine_is_itself_in_either_family(host: str) -> None:
    assert status(host, "/v1/control/start-run") == 200


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
    door = FleetOnly(app)
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
