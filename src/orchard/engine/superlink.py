"""A SuperLink that strangers can only knock at.

Flower's SuperLink serves three interfaces on one port: the fleet's, for SuperNodes, which can ask
for their keys; the control interface, which registers nodes and starts apps; and the runtime's,
for its own processes. The last two ask for nothing by default.

Here it listens twice: at a port of the loopback device, where everything is served, and at the
public address, where the fleet's interface is and no more. Which of the two a request came in by is
known from its socket. Where it came from is not: behind a proxy on this machine every stranger
comes from here. So nothing is granted to a caller's address, and a request that says it was
forwarded is refused unless it comes from a proxy that the owner trusts.

Run as ``python -m orchard.engine.superlink --public HOST:PORT`` with the arguments of
``flower-superlink``, which are about the port of the loopback device.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import uvicorn
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.main import create_app

from orchard.engine.bell import Bell
from orchard.process_memory import loading_to_stay, return_memory_at_once

log = logging.getLogger(__name__)
_FLEET = "/v1/fleet/"
_SAY_AGAIN_SECONDS, _MAX_HOSTS = 60.0, 1000
MAX_BODY_BYTES = 64 << 20
"""Longest body of a request at the public port, whoever sends it: Flower cuts messages into chunks
of 5 MiB, and would read any body into memory before it looks at who sent it."""
# What proxies add, each in its own way; one that adds nothing reaches the public port like anybody.
_FORWARDED = frozenset(
    {
        *(b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"x-cluster-client-ip"),
        *(b"x-original-forwarded-for", b"x-envoy-external-address", b"true-client-ip"),
        *(b"cf-connecting-ip", b"fastly-client-ip", b"client-ip", b"x-proxyuser-ip"),
    }
)


class FrontDoor:
    """Wraps an ASGI app: at the public port, only the fleet's paths are served."""

    def __init__(
        self,
        app: Any,
        *,
        own_port: int,
        trusted: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = (),
    ) -> None:
        """Guard ``app``.

        Args:
            app: Serves everything.
            own_port: Of the loopback device, where this machine's own processes call.
            trusted: Where proxies call from whose requests may say that they were forwarded.
        """
        self._app, self._own_port, self._trusted = app, own_port, trusted
        self._said: dict[str, float] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if not self._may_pass(scope):
            await _answer(send, 403)
            return
        if self._is_own(scope):
            await self._app(scope, receive, send)
            return
        if _length(scope) > MAX_BODY_BYTES:
            await _answer(send, 413)
            return
        self._look_at_clock(scope)
        await self._app(scope, _bounded(receive), send)

    def _may_pass(self, scope: Mapping[str, Any]) -> bool:
        is_forwarded = any(
            name.lower() in _FORWARDED or name.lower().startswith(b"x-forwarded")
            for name, _ in scope.get("headers") or ()
        )
        if self._is_own(scope):
            return not is_forwarded
        if is_forwarded and not self._is_trusted((scope.get("client") or ("",))[0]):
            return False
        # Paths with dots or doubled slashes are for nobody's good.
        path = str(scope.get("path", ""))
        return path.startswith(_FLEET) and ".." not in path and "//" not in path

    def _is_own(self, scope: Mapping[str, Any]) -> bool:
        """Say whether a request came in by the port of the loopback device."""
        host, port = (scope.get("server") or ("", None))[:2]
        return bool(port == self._own_port and _is_loopback(host))

    def _is_trusted(self, host: str) -> bool:
        address = _address(host)
        return address is not None and any(address in network for network in self._trusted)

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


async def _answer(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def _length(scope: Mapping[str, Any]) -> int:
    """Return how long a request says that its body is; 0 where it does not."""
    said = dict(scope.get("headers") or ()).get(b"content-length", b"0")
    return int(said) if said.isdigit() and len(said) < 20 else MAX_BODY_BYTES + 1


def _bounded(receive: Any) -> Any:
    """Return what receives a body of a bounded length; from a longer one its sender has gone."""
    num_bytes = 0

    async def bounded() -> Any:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        return message if num_bytes <= MAX_BODY_BYTES else {"type": "http.disconnect"}

    return bounded


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


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    # How a socket for both families shows a caller of the older one.
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_loopback


def server_of(app: Any, **options: Any) -> uvicorn.Server:
    """Return what serves an app, and takes the caller for who called."""
    # With proxy_headers, whoever a header names would be the caller.
    config = uvicorn.Config(app, log_level="warning", workers=1, proxy_headers=False, **options)
    return uvicorn.Server(config)


def main() -> None:
    """Serve until stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    return_memory_at_once()  # messages come and go in blocks of megabytes
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--public", required=True)
    parser.add_argument("--trusted-proxy", action="append", default=[])
    given, rest = parser.parse_known_args()
    sys.argv[1:] = rest  # what is left is Flower's, which reads it from there
    config = _parse_superlink_lifespan_config()
    trusted = tuple(ipaddress.ip_network(one) for one in given.trusted_proxy)
    host, _, port = given.public.rpartition(":")
    # It serves for as long as it lives: what was loaded is not looked through for garbage.
    with loading_to_stay():
        app = Bell(create_app(config, SuperLinkLifespan), own_port=config.port)
    served = FrontDoor(app, own_port=config.port, trusted=trusted)
    sockets = [listening(host.strip("[]"), int(port)), listening(config.host, config.port)]
    server = server_of(served, ssl_keyfile=config.ssl_keyfile, ssl_certfile=config.ssl_certfile)
    server.run(sockets=sockets)


if __name__ == "__main__":
    main()
