"""One base, served by us and by ``transformers serve``: tokens per second over HTTP."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import httpx

from orchard.measurements.serving_process import orchard_server, transformers_server
from orchard.models.stored.sources import resolve
from orchard.serving.registry import BASE

_NUM_AT_ONCE, _NEW_TOKENS = 50, 32
_NEEDS = ("openai", "accelerate", "pydantic", "rich")


def why_no_peer() -> str:
    """Say which packages ``transformers serve`` lacks here; empty = none."""
    import importlib.util

    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} must be installed; pip install 'transformers[serving]'" * bool(
        missing
    )


def beside_transformers(
    model: str, *, repeats: int, seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Ask all servers for the base's greedy answers, 50 at a time, and compare what they write.

    All run at once, and are asked in turns, so that a machine's good and bad minutes come to each.

    Args:
        model: The base.
        repeats: Turns; the medians count.
        seconds: How long a server is asked in a turn; what runs then is finished.
        say: Told what is measured.

    Returns:
        Tokens per second and per answer of each, ours over the better of the peer's two ways, and
        of how many prompts all three wrote the same; None for these where the peer does not run,
        with the reason.
    """
    none = {"over_transformers_serve": None, "same_greedy_texts": None}
    if missing := why_no_peer():
        return {**none, "why_none": f"over_transformers_serve: {missing}"}
    own = resolve(model)
    say(f"serve: the base beside transformers serve, {repeats} times {seconds:g} s each")
    with ExitStack() as stack:
        try:
            sides = {
                "orchard": (stack.enter_context(orchard_server(model, num_models=0)), BASE),
                "transformers": (
                    stack.enter_context(transformers_server(model, is_continuous=False)),
                    own,
                ),
                "transformers_continuous": (
                    stack.enter_context(transformers_server(model, is_continuous=True)),
                    own,
                ),
            }
        except RuntimeError as error:
            return {**none, "why_none": f"over_transformers_serve: {error}"}
        prompts = [_prompt(number) for number in range(8)]
        texts = {  # the first answers also pay for what is made once
            name: asyncio.run(_texts(url, asked, prompts)) for name, (url, asked) in sides.items()
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        lengths: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, (url, asked) in sides.items():
                speed, length = asyncio.run(_speed(url, asked, seconds))
                found[name].append(speed)
                lengths[name].append(length)
    speeds = {name: statistics.median(values) for name, values in found.items()}
    peer = max(speeds["transformers"], speeds["transformers_continuous"])
    return {
        "base_tokens_per_second": speeds,
        "base_tokens_per_second_of_each_turn": found,
        "base_tokens_per_answer": {n: statistics.median(own) for n, own in lengths.items()},
        "base_seconds_of_a_turn": seconds,
        "over_transformers_serve": speeds["orchard"] / peer,
        "same_greedy_texts": _num_same(texts),
    }


def _num_same(texts: Mapping[str, Sequence[str]]) -> int:
    return sum(len(set(said)) == 1 for said in zip(*texts.values(), strict=True))


def _prompt(number: int) -> str:
    """Return the begin of a sentence: behind words by chance, a base may have nothing to say."""
    return f"The office number {number} is in the city and"


async def _texts(url: str, model: str, prompts: Sequence[str]) -> list[str]:
    async with httpx.AsyncClient(timeout=300) as client:
        return [(await _ask(client, url, model, prompt))[0] for prompt in prompts]


async def _speed(url: str, model: str, seconds: float) -> tuple[float, float]:
    """Return tokens per second, from the first question to the last answer, and per answer."""
    num_tokens = num_answers = 0
    limits = httpx.Limits(max_connections=_NUM_AT_ONCE)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        started = time.perf_counter()

        async def go_on(number: int) -> None:
            nonlocal num_tokens, num_answers
            asked = number
            while time.perf_counter() < started + seconds:
                # Added after it was awaited: what others added meanwhile would be lost.
                _, written = await _ask(client, url, model, _prompt(asked))
                num_tokens += written
                asked += _NUM_AT_ONCE
                num_answers += 1

        await asyncio.gather(*(go_on(number) for number in range(_NUM_AT_ONCE)))
        return num_tokens / (time.perf_counter() - started), num_tokens / num_answers


async def _ask(client: httpx.AsyncClient, url: str, model: str, prompt: str) -> tuple[str, int]:
    body = {"model": model, "prompt": prompt, "max_tokens": _NEW_TOKENS, "temperature": 0}
    # A connection each: one that is kept may be closed by its server just as it is used again.
    answer = await client.post(f"{url}/v1/completions", json=body, headers={"connection": "close"})
    answer.raise_for_status()
    said = answer.json()
    return str(said["choices"][0]["text"]), int(said["usage"]["completion_tokens"])
