"""OpenAI's interface over one engine."""

from __future__ import annotations

import asyncio
import difflib
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from orchard.serving.engine import Row, TokenScores
from orchard.serving.protocol import MAX_BODY_BYTES, Chat, Completion, RefusedError, decode
from orchard.serving.registry import Registry
from orchard.serving.text import GrowingText
from orchard.serving.worker import Job, Worker

_log = logging.getLogger(__name__)

Encode = Callable[[str, list[tuple[str, str]]], list[int]]
"""From a model's name and a conversation to the prompt's ids."""


@dataclass(frozen=True)
class Served:
    """What the application serves.

    Attributes:
        worker: Runs the engine.
        tokenizer: The base's.
        encode_chat: See ``Encode``; raises ``ValueError`` for what no template takes.
        end_ids: Tokens that end an answer.
        context: At most so many tokens of prompt and answer.
        vocabulary: Rows of the embedding.
        keys: Key to the models that it may use, None = all; no key = whoever asks may use all.
    """

    worker: Worker
    tokenizer: Any
    encode_chat: Encode
    end_ids: frozenset[int]
    context: int
    vocabulary: int
    keys: Mapping[str, frozenset[str] | None]

    def visible(self, request: Request) -> list[str]:
        """Return the models that a request's key may use.

        Raises:
            RefusedError: The key is none of these.
        """
        names = list(self.worker.registry.sources)
        if not self.keys:
            return names
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        allowed: list[frozenset[str] | None] = []
        for key, models in self.keys.items():  # every key is compared, whichever it is
            if hmac.compare_digest(given, key.encode()):
                allowed.append(models)
        if not allowed:
            raise RefusedError(401, "the API key must be a known one", code="invalid_api_key")
        own = allowed[0]
        return names if own is None else [name for name in names if name in own]


def make_app(served: Served) -> FastAPI:
    """Return the application; while it lives, the engine's thread runs."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        yield
        await asyncio.to_thread(served.worker.stop)

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        return JSONResponse(error.body, status_code=error.status)

    app.add_exception_handler(RefusedError, refused)

    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        served.visible(request)
        number = served.worker.num_waiting_or_running
        return PlainTextResponse(f"# TYPE orchard_requests gauge\norchard_requests {number}\n")

    async def models(request: Request) -> Response:
        names = served.visible(request)
        listed = [{"id": n, "object": "model", "created": 0, "owned_by": "orchard"} for n in names]
        return JSONResponse({"object": "list", "data": listed})

    async def completions(request: Request) -> Response:
        names = served.visible(request)
        asked: Completion = decode(await _body(request), Completion)
        _check_model(asked.model, names)
        asked.check(16)
        prompts = [
            served.tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in asked.prompts()
        ]
        return await _answer(served, request, asked, prompts, is_chat=False)

    async def chat(request: Request) -> Response:
        names = served.visible(request)
        asked: Chat = decode(await _body(request), Chat)
        _check_model(asked.model, names)
        asked.check(256)
        turns = [(message.role, message.content) for message in asked.messages]
        try:
            prompt = served.encode_chat(asked.model, turns)
        except ValueError as error:
            raise RefusedError(400, str(error), parameter="messages") from error
        return await _answer(served, request, asked, [prompt], is_chat=True)

    app.add_api_route("/health", health)
    app.add_api_route("/metrics", metrics)
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"])
    return app


async def _body(request: Request) -> bytes:
    """Read a body of bounded size."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise RefusedError(413, f"the body must have up to {MAX_BODY_BYTES} bytes")
    return bytes(content)


def _check_model(name: str, visible: list[str]) -> None:
    if name not in visible:
        nearest = difflib.get_close_matches(name[:100], visible, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise RefusedError(
            404, f"model must be a served one, got {name[:100]}{hint}", code="model_not_found"
        )


async def _answer(
    served: Served, request: Request, asked: Any, prompts: list[list[int]], *, is_chat: bool
) -> Response:
    wanted = asked.tokens(256 if is_chat else 16)
    for prompt in prompts:
        if not prompt or len(prompt) + wanted > served.context:
            raise RefusedError(
                400,
                f"prompt and max_tokens must be 1..{served.context} tokens, got "
                f"{len(prompt)} and {wanted}",
                code="context_length_exceeded",
            )
        if not all(0 <= index < served.vocabulary for index in prompt):
            raise RefusedError(400, f"tokens must be in 0..{served.vocabulary - 1}")
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Row | Exception]]()
    top = -1 if is_chat or asked.logprobs is None else asked.logprobs
    echo = not is_chat and asked.echo
    seed = secrets.randbits(62) if asked.seed is None else abs(asked.seed) % 2**62
    rows: dict[int, Row] = {}

    def make(registry: Registry, number: int, prompt: list[int], choice: int) -> Row:
        rows[number] = Row(
            registry.values(asked.model),
            prompt,
            wanted,
            sampling=asked.sampling(),
            seed=seed + choice,
            end_ids=served.end_ids,
            num_top=top,
            scores_prompt=echo and top >= 0,
        )
        return rows[number]

    def tell(number: int, what: Row | Exception) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, (number, what))

    copies = [(p, c) for p in prompts for c in range(asked.n or 1)]
    jobs = [
        Job(asked.model, partial(make, number=i, prompt=p, choice=c), partial(tell, i))
        for i, (p, c) in enumerate(copies)
    ]
    if not served.worker.submit(jobs):
        raise RefusedError(429, "the queue is full; ask again later", code="queue_full")
    kind = "chat.completion" if is_chat else "text_completion"
    name = "chat.completion.chunk" if is_chat and asked.stream else kind
    about = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": name,
        "created": int(time.time()),
        "model": asked.model,
    }

    def choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
        if not is_chat:
            return {**said, "text": text}
        turn = {"role": "assistant", "content": text}
        return {**said, ("delta" if asked.stream else "message"): turn}

    async def grow() -> AsyncIterator[tuple[int, str, str | None]]:
        """Yield what is new of each choice, and why it ended where it has."""
        sent, open_choices = dict.fromkeys(range(len(copies)), 0), set(range(len(copies)))
        growing = [GrowingText(served.tokenizer, served.end_ids) for _ in copies]
        try:
            while open_choices:
                try:
                    number, what = await asyncio.wait_for(heard.get(), 1.0)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if isinstance(what, Exception):
                    # What went wrong names files of this machine: it is for its own log alone.
                    _log.error("%s cannot be served", asked.model, exc_info=what)
                    raise RefusedError(500, f"{asked.model} cannot be served; see the server's log")
                if number not in open_choices:
                    continue
                # Why it ended first: the engine may write on while this is read.
                finish = what.finish or None
                whole = growing[number].grow(what.tokens, is_last=finish is not None)
                text, is_stopped = _stopped(whole, asked.stops())
                finish = "stop" if is_stopped else finish
                if is_stopped:
                    what.is_cancelled = True
                # Held back while it may be the beginning of a stop text or half of a letter.
                held = max((len(stop) for stop in asked.stops()), default=1) - 1
                end = len(text) if finish else max(len(text.rstrip("\ufffd")) - held, 0)
                if finish or end > sent[number]:
                    yield number, text[sent[number] : end], finish
                    sent[number] = max(end, sent[number])
                if finish:
                    open_choices.discard(number)
        finally:
            for number in open_choices:
                if number in rows:
                    rows[number].is_cancelled = True

    if asked.stream:

        async def events() -> AsyncIterator[str]:
            try:
                async for index, text, finish in grow():
                    part = {**about, "choices": [choice(index, text, finish)]}
                    yield f"data: {json.dumps(part)}\n\n"
            except RefusedError as error:
                yield f"data: {json.dumps(error.body)}\n\n"
            else:
                if asked.stream_options is not None and asked.stream_options.include_usage:
                    last = {**about, "choices": [], "usage": _usage(prompts, rows)}
                    yield f"data: {json.dumps(last)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")
    texts, ends = [""] * len(copies), ["length"] * len(copies)
    async for index, text, finish in grow():
        texts[index] += text
        ends[index] = finish or ends[index]
    choices = []
    for index, (prompt, _) in enumerate(copies):
        whole = (served.tokenizer.decode(prompt) if echo else "") + texts[index]
        made = choice(index, whole, ends[index])
        if top >= 0:
            made["logprobs"] = _logprobs(served, rows[index], with_prompt=echo)
        choices.append(made)
    return JSONResponse({**about, "choices": choices, "usage": _usage(prompts, rows)})


def _usage(prompts: list[list[int]], rows: Mapping[int, Row]) -> dict[str, int]:
    read, written = sum(map(len, prompts)), sum(len(row.tokens) for row in rows.values())
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _stopped(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return a text up to the first stop text, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _logprobs(served: Served, row: Row, *, with_prompt: bool) -> dict[str, Any]:
    def shown(index: int) -> str:
        text = str(served.tokenizer.decode([index]))
        return f"token_id:{index}" if "\ufffd" in text or not text else text

    tokens = [*(row.prompt if with_prompt else ()), *row.tokens]
    scores: list[TokenScores | None] = [
        *([None, *row.prompt_scores] if with_prompt else ()),
        *row.scores,
    ]
    names = [shown(index) for index in tokens]
    starts = [sum(map(len, names[:place])) for place in range(len(names))]
    return {
        "tokens": names,
        "token_logprobs": [score.logprob if score else None for score in scores],
        "top_logprobs": [
            {shown(index): value for index, value in score.top} if score else None
            for score in scores
        ],
        "text_offset": starts,
    }
