"""How often a site is asked to do something in an hour."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_HOUR_SECONDS = 3600.0


class Pace:
    """Counts requests of the last hour.

    It is not kept on disk: it bounds how fast an audit grows and how busy a site is, and what a
    coordinator may learn is bounded for itself.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow ``most`` requests in an hour.

        Args:
            most: At least 1.
            clock: Seconds, monotonic.
        """
        self._most, self._clock = most, clock
        self._times: deque[float] = deque()
        self._said_at = -_HOUR_SECONDS

    def allows(self) -> bool:
        """Say whether one more request may be answered, and count it where it may."""
        now = self._clock()
        while self._times and now - self._times[0] >= _HOUR_SECONDS:
            self._times.popleft()
        if len(self._times) >= self._most:
            return False
        self._times.append(now)
        return True

    def is_news(self) -> bool:
        """Say whether a refusal is to be written down: the first one of an hour is."""
        is_new = self._clock() - self._said_at >= _HOUR_SECONDS
        if is_new:
            self._said_at = self._clock()
        return is_new
