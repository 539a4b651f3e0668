"""A SuperLink that strangers can only knock at.

Flower's SuperLink serves three interfaces on one port: the fleet's, for SuperNodes, which can ask
for their keys; the control interface, which registers nodes and starts apps; and the runtime's,
for its own processes. The last two ask for nothing by default. Here they answer this machine
alone, and other machines reach the fleet's interface and no more.

Run as ``python -m orchard.engine.superlink`` with the arguments of ``flower-superlink``.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import uvicorn
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.main import create_app

log = logging.getLogger(__name__)
_FLEET = "/v1/fleet/"
_SAY_AGAIN_SECONDS, _MAX_HOSTS = 60.0, 1000


class FleetOnly:
    """Wraps an ASGI app: from other machines, only the fleet's paths are served."""

    def __init__(self, app: Any) -> None:
        """Guard ``app``."""
        self._app = app
        self._said: dict[str, float] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "lifespan" or self._may_pass(scope):
            self._look_at_clock(scope)
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    def _may_pass(scope: Mapping[str, Any]) -> bool:
        # Paths with dots or doubled slashes are for nobody's good.
        path = str(scope.get("path", ""))
        if path.startswith(_FLEET) and ".." not in path and "//" not in path:
            return True
        host = (scope.get("client") or ("",))[0]
        try:
            own = ipaddress.ip_address(host)
            # How a socket for both families shows a caller of the older one.
            own = getattr(own, "ipv4_mapped", None) or own
            if own.is_loopback:
                return True
            # Who calls from the address that is called is this machine too.
            return bool(host == (scope.get("server") or ("",))[0])
        except ValueError:
            return False

    def _look_at_clock(self, scope: Mapping[str, Any]) -> None:
        """Say so where Flower will not let a site in because of its clock: it gives no reason."""
        signed_at = dict(scope.get("headers") or ()).get(TIMESTAMP_HEADER.encode())
        if signed_at is None:
            return
        skew = clock_skew(signed_at.decode("latin-1"), now=datetime.now(UTC))
        if skew is None:
            return
        host, now = str((scope.get("client") or ("",))[0]), time.monotonic()
        if now - self._said.get(host, -_SAY_AGAIN_SECONDS) < _SAY_AGAIN_SECONDS:
            return
        if len(self._said) >= _MAX_HOSTS:
            self._said.clear()
        self._said[host] = now
        log.warning(
            "a site at %s is not let in: its clock is %.0f seconds %s this machine's, and may be "
            "%d ahead or %d behind; set both by a time server",
            host,
            abs(skew),
            "ahead of" if skew > 0 else "behind",
            SYSTEM_TIME_TOLERANCE,
            TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE,
        )


def clock_skew(signed_at: str, *, now: datetime) -> float | None:
    """Return by how many seconds a site's clock is ahead, where that is more than Flower bears.

    Args:
        signed_at: What the site says the time is, as ISO 8601.
        now: What it is here.

    Returns:
        Seconds, below 0 where the site is behind; None where it is near enough, or says no time.
    """
    try:
        ahead = (datetime.fromisoformat(signed_at) - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    is_near = -(TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE) < ahead < SYSTEM_TIME_TOLERANCE
    return None if is_near else ahead


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; ``::`` is every address of either family.

    Else a server at ``::`` would not be reached by this machine's own processes, which call
    127.0.0.1, nor by sites without IPv6.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    is_both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, dualstack_ipv6=is_both)


def main() -> None:
    """Serve until stopped, by the arguments of ``flower-superlink``."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    config = _parse_superlink_lifespan_config()
    own = uvicorn.Config(
        FleetOnly(create_app(config, SuperLinkLifespan)),
        log_level="warning",
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        workers=1,
    )
    sockets = [listening(config.host, config.port)] if config.host == "::" else None
    if sockets is None:
        own.host, own.port = config.host, config.port
    uvicorn.Server(own).run(sockets=sockets)


if __name__ == "__main__":
    main()
