from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("flwr")
from orchard.engine.superlink import FleetOnly

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
