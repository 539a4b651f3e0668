"""A SuperLink that strangers can only knock at.

Flower's SuperLink serves three interfaces on one port: the fleet's, for SuperNodes, which can ask
for their keys; the control interface, which registers nodes and starts apps; and the runtime's,
for its own processes. The last two ask for nothing by default. Here they answer this machine
alone, and other machines reach the fleet's interface and no more.

Run as ``python -m orchard.engine.superlink`` with the arguments of ``flower-superlink``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

import uvicorn
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.main import create_app

_FLEET = "/v1/fleet/"


class FleetOnly:
    """Wraps an ASGI app: from other machines, only the fleet's paths are served."""

    def __init__(self, app: Any) -> None:
        """Guard ``app``."""
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] == "lifespan" or self._may_pass(scope):
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
            if ipaddress.ip_address(host).is_loopback:
                return True
            # Who calls from the address that is called is this machine too.
            return bool(host == (scope.get("server") or ("",))[0])
        except ValueError:
            return False


def main() -> None:
    """Serve until stopped, by the arguments of ``flower-superlink``."""
    config = _parse_superlink_lifespan_config()
    uvicorn.run(
        FleetOnly(create_app(config, SuperLinkLifespan)),
        host=config.host,
        port=config.port,
        log_level="warning",
        ssl_keyfile=config.ssl_keyfile,
        ssl_certfile=config.ssl_certfile,
        workers=1,
    )


if __name__ == "__main__":
    main()
