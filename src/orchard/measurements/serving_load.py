"""Fifty requests at a time to a server that listens, over HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from orchard.measurements.serving_process import client_name, orchard_server

_NUM_AT_ONCE, _PROMPT_TOKENS, _NEW_TOKENS = 50, 32, 16


@dataclass
class _Heard:
    """What came back: seconds to first events, seconds between events, answers, failures."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    num_answers: int = 0
    errors: list[str] = field(default_factory=list)


def load_server(model: str, *, num_models: int, seconds: float) -> dict[str, Any]:
    """Ask a server in a process of its own for streams of many models, and return what was seen.

    Args:
        model: The base.
        num_models: Random models beside it; each request is for one of them by chance.
        seconds: No request starts after so many; those that run are finished.

    Raises:
        RuntimeError: The server does not come up.
    """
    names = [client_name(number) for number in range(num_models)]
    with orchard_server(model, num_models=num_models) as url:
        address = f"{url}/v1/completions"
        asyncio.run(_ask(address, names, 0.5))  # also pays for what is made once
        heard = asyncio.run(_ask(address, names, seconds))
    return {
        "load_seconds": seconds,
        "load_at_once": _NUM_AT_ONCE,
        "load_answers": heard.num_answers,
        "p50_first_token_seconds": _quantile(heard.first, 50),
        "p99_first_token_seconds": _quantile(heard.first, 99),
        "p50_between_tokens_seconds": _quantile(heard.between, 50),
        "p99_between_tokens_seconds": _quantile(heard.between, 99),
        "errors": len(heard.errors),
        "first_error": heard.errors[0] if heard.errors else None,
    }


async def _ask(url: str, names: Sequence[str], seconds: float) -> _Heard:
    heard, end = _Heard(), time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=_NUM_AT_ONCE)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:

        async def go_on(number: int) -> None:
            draw = random.Random(number)
            while time.perf_counter() < end:
                body = {
                    "model": draw.choice(names),
                    "prompt": [draw.randrange(10, 300) for _ in range(_PROMPT_TOKENS)],
                    "max_tokens": _NEW_TOKENS,
                    "stream": True,
                }
                try:
                    await _hear(client, url, body, heard)
                except (httpx.HTTPError, ValueError) as error:
                    heard.errors.append(f"{type(error).__name__}: {error}")

        await asyncio.gather(*(go_on(number) for number in range(_NUM_AT_ONCE)))
    return heard


async def _hear(client: httpx.AsyncClient, url: str, body: Any, heard: _Heard) -> None:
    """Read one stream to its end.

    Raises:
        ValueError: It was refused, or ended without having been finished.
    """
    last, is_first, is_finished = time.perf_counter(), True, False
    async with client.stream("POST", url, json=body, headers={"connection": "close"}) as answer:
        if answer.status_code != 200:
            raise ValueError(f"status must be 200, got {answer.status_code}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(f"an event must be no error, got {event['error']['message']}")
            now = time.perf_counter()
            (heard.first if is_first else heard.between).append(now - last)
            last, is_first = now, False
            is_finished |= event["choices"][0]["finish_reason"] is not None
    if not is_finished:
        raise ValueError("a stream must end with a reason, got none")
    heard.num_answers += 1


def _quantile(values: Sequence[float], percent: int) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
