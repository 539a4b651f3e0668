"""Who looks for messages waits for one, and no longer than is allowed."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

pytest.importorskip("flwr")

from orchard.engine.bell import Bell

OWN = 7000
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/runtime/push-messages"


class Counts:
    """An app that notes what reached it."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])


async def nothing(*args: Any) -> None:
    return None


def request(path: str, *, port: int = 443, site: int = 1) -> dict[str, Any]:
    return {
        "type": "http",
        "path": path,
        "server": ("127.0.0.1", port),
        "client": ("10.0.0.1", 5000),
        "headers": [(b"flwr-public-key", str(site).encode())],
    }


async def took(bell: Bell, scope: dict[str, Any]) -> float:
    started = time.monotonic()
    await bell(scope, nothing, nothing)
    return time.monotonic() - started


def make(held_seconds: float = 0.6) -> tuple[Bell, Counts]:
    app = Counts()
    return Bell(app, own_port=OWN, held_seconds=held_seconds), app


def test_the_first_question_passes_and_the_next_waits_until_its_time_is_over() -> None:
    async def play() -> None:
        bell, app = make()
        assert await took(bell, request(PULL)) < 0.3
        assert await took(bell, request(PULL)) >= 0.5
        assert app.paths == [PULL, PULL]

    asyncio.run(play())


def test_a_message_wakes_all_who_wait_once_after_the_last_of_its_kind() -> None:
    async def play() -> None:
        bell, app = make(held_seconds=20.0)
        for site in range(3):
            await took(bell, request(PULL, site=site))
        waiting = [asyncio.create_task(took(bell, request(PULL, site=n))) for n in range(3)]
        await asyncio.sleep(0.1)
        for _ in range(3):
            await bell(request(PUSH, port=OWN), nothing, nothing)
        assert max(await asyncio.gather(*waiting)) < 5
        # All three messages were left before anybody was woken.
        assert app.paths == [PULL] * 3 + [PUSH] * 3 + [PULL] * 3

    asyncio.run(play())


def test_a_message_that_came_while_nobody_waited_is_not_waited_for() -> None:
    async def play() -> None:
        bell, _ = make(held_seconds=20.0)
        await took(bell, request(PULL))
        await bell(request(PUSH, port=OWN), nothing, nothing)
        await asyncio.sleep(0.3)
        assert await took(bell, request(PULL)) < 5

    asyncio.run(play())


@pytest.mark.parametrize(
    "scope",
    [
        request(PUSH),  # at the public port
        request("/v1/fleet/push-messages", port=OWN),
        request("/v1/runtime/pull-messages", port=OWN),
    ],
)
def test_nothing_else_wakes_anybody_or_is_held(scope: dict[str, Any]) -> None:
    async def play() -> None:
        bell, _ = make()
        await took(bell, request(PULL))
        waiting = asyncio.create_task(took(bell, request(PULL)))
        assert await took(bell, scope) < 0.3
        assert await waiting >= 0.5

    asyncio.run(play())


def test_the_memory_of_callers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchard.engine.bell._MOST_CALLERS", 5)

    async def play() -> None:
        bell, _ = make()
        for site in range(50):
            await took(bell, request(PULL, site=site))
        assert len(bell._seen) == 5
        assert await took(bell, request(PULL, site=0)) < 0.3
        assert await took(bell, request(PULL, site=49)) >= 0.5

    asyncio.run(play())


def test_so_many_questions_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks: they are held before anybody looks at a key. Beyond it sites ask again."""
    monkeypatch.setattr("orchard.engine.bell._MOST_HELD", 3)

    async def play() -> None:
        bell, _ = make(held_seconds=0.6)
        for site in range(8):
            await took(bell, request(PULL, site=site))
        waits = await asyncio.gather(*(took(bell, request(PULL, site=n)) for n in range(8)))
        assert [wait >= 0.5 for wait in waits] == [True] * 3 + [False] * 5
        assert await took(bell, request(PULL, site=7)) >= 0.5  # the places are free again

    asyncio.run(play())


def test_no_more_of_a_key_is_kept_than_one_has() -> None:
    """Ten thousand headers of 64 KiB, which anybody may send, were kept."""

    async def play() -> None:
        bell, _ = make()
        scope = request(PULL)
        await bell({**scope, "headers": [(b"flwr-public-key", b"k" * 60_000)]}, nothing, nothing)
        ((_, key),) = bell._seen
        assert len(key) == 512

    asyncio.run(play())
