"""Sites wait for a message instead of asking for one again and again.

Whoever looks for messages is held until one was left for anybody since that same caller looked
last, or a few seconds have passed; then the question goes to Flower's SuperLink, which answers as
ever. So a question costs nothing while there is nothing to do, and any SuperNode may ask.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from typing import Any

from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

_PULL, _PUSH = "/v1/fleet/pull-messages", "/v1/runtime/push-"
HELD_SECONDS = 5.0
"""Who asks gives up after 30 seconds, and has signed when it asked."""
_QUIET_SECONDS, _MOST_QUIET_SECONDS = 0.05, 0.5
"""Messages for many sites come one after another: all sites are woken after the last of them."""
_MOST_CALLERS, _LONGEST_KEY = 10_000, 512
_MOST_HELD = 2_000
"""Questions held at a time, of whoever: one is held before Flower looks who asks, with its head."""


class Bell:
    """Wraps an ASGI app, which has Flower's fleet and runtime interfaces."""

    def __init__(self, app: Any, *, own_port: int, held_seconds: float = HELD_SECONDS) -> None:
        """Hold questions to ``app``.

        Args:
            app: Answers them.
            own_port: Where messages are left, by this machine's own process.
            held_seconds: Longest that a question waits.
        """
        self._app, self._own_port, self._held = app, own_port, held_seconds
        self._count = 0
        self._changed = asyncio.Event()
        self._ringing: asyncio.Task[None] | None = None
        self._last_push = 0.0
        self._num_held = 0
        # Caller to the count when it looked last.
        self._seen: OrderedDict[tuple[Any, bytes], int] = OrderedDict()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, one for messages when it is time."""
        path = str(scope.get("path", "")) if scope["type"] == "http" else ""
        if path == _PULL:
            await self._wait(scope)
        await self._app(scope, receive, send)
        if path.startswith(_PUSH) and (scope.get("server") or ("", None))[1] == self._own_port:
            self._ring_soon()

    async def _wait(self, scope: Any) -> None:
        key = dict(scope.get("headers") or ()).get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode())
        # Anybody may send any key: no more of it is kept than the longest that is one.
        caller = tuple(scope.get("client") or ()), (key or b"")[:_LONGEST_KEY]
        if self._seen.get(caller) == self._count and self._num_held < _MOST_HELD:
            changed = self._changed
            self._num_held += 1
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), self._held)
            finally:
                self._num_held -= 1
        self._seen[caller] = self._count
        self._seen.move_to_end(caller)
        if len(self._seen) > _MOST_CALLERS:
            self._seen.popitem(last=False)

    def _ring_soon(self) -> None:
        self._last_push = asyncio.get_running_loop().time()
        if self._ringing is None or self._ringing.done():
            self._ringing = asyncio.create_task(self._ring())

    async def _ring(self) -> None:
        clock = asyncio.get_running_loop().time
        first = clock()
        while (left := self._last_push + _QUIET_SECONDS - clock()) > 0:
            if clock() - first >= _MOST_QUIET_SECONDS:
                break
            await asyncio.sleep(left)
        self._count += 1
        # Who waits has the old one; who comes later waits for the next.
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
