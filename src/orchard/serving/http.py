"""OpenAI's interface over one engine: addresses, keys, bodies."""

from __future__ import annotations

import asyncio
import difflib
import hmac
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from orchard.serving.answering import Served, answer
from orchard.serving.connections import is_loopback
from orchard.serving.counting import plain
from orchard.serving.protocol import MAX_BODY_BYTES, Chat, Completion, RefusedError, decode

__all__ = ["Served", "make_app"]

# A body of the largest size at what a slow line carries.
_BODY_SECONDS = 60.0
# A body that is refused is read to its end, so that the reason arrives: who still sends when the
# connection is closed may see nothing of it.
_MAX_DRAINED_BYTES, _DRAIN_SECONDS = 512 * 2**20, 30.0


def make_app(served: Served) -> FastAPI:
    """Return the application; while it lives, the engine's thread runs."""
    answers = served.counts.answers
    # Tokenizers change their settings while they read, so one thread has them; the loop goes on.
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="orchard-tokens")

    async def read(call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(reader, call, *arguments)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        yield
        await asyncio.to_thread(served.worker.stop)
        reader.shutdown(cancel_futures=True)

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        answers[error.status] += 1
        await _drain(request)
        # Who did not send all of a body in time would send the rest as if it were a request.
        headers = {"connection": "close"} if error.status == 408 else None
        return JSONResponse(error.body, status_code=error.status, headers=headers)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = f"{request.method} and the address must be of those that are served"
        made = await refused(request, RefusedError(error.status_code, said))
        made.headers.update(error.headers or {})
        return made

    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(HTTPException, unknown)

    async def health() -> Response:
        is_well = served.worker.is_alive
        said = {"status": "ok" if is_well else "the engine has stopped"}
        return JSONResponse(said, status_code=200 if is_well else 503)

    async def metrics(request: Request) -> Response:
        _visible(served, request)
        worker = served.worker
        lines = [
            *plain("requests_waiting", worker.num_waiting, "Answers that wait for a row."),
            *plain("requests_running", worker.num_running, "Answers that are written."),
            *plain("models_in_memory", len(worker.registry.held), "Beside the base."),
            *plain("tokens_written_total", worker.num_tokens, "Of answers."),
            *served.counts.lines(),
        ]
        text = "\n".join(lines) + "\n"
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        names = _visible(served, request)
        return JSONResponse({"object": "list", "data": [_told(name) for name in names]})

    async def model(request: Request, name: str) -> Response:
        _check_model(name, _visible(served, request))
        return JSONResponse(_told(name))

    async def completions(request: Request) -> Response:
        names = _visible(served, request)
        asked: Completion = decode(await _body(request), Completion)
        _check_model(asked.model, names)
        asked.check(16)
        asked.num_top()
        prompts = await read(_encode, served, asked.prompts())
        made = await answer(served, request, asked, prompts)
        answers[made.status_code] += 1
        return made

    async def chat(request: Request) -> Response:
        names = _visible(served, request)
        asked: Chat = decode(await _body(request), Chat)
        _check_model(asked.model, names)
        asked.check(256)
        asked.num_top()
        turns = [(message.speaker(), message.text()) for message in asked.messages]
        _check_length(served, sum(len(text) for _, text in turns), parameter="messages")
        try:
            prompt = await read(served.encode_chat, asked.model, turns)
        except ValueError as error:
            raise RefusedError(400, str(error), parameter="messages") from error
        made = await answer(served, request, asked, [prompt])
        answers[made.status_code] += 1
        return made

    app.add_api_route("/health", health)
    app.add_api_route("/metrics", metrics)
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/models/{name:path}", model)
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"])
    return app


def _told(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "orchard"}


def _encode(served: Served, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Return prompts as tokens, of which none that is too long is read.

    Raises:
        RefusedError: One is too long for the context, whatever its tokens are.
    """
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_length(served, len(prompt), parameter="prompt")
    return [
        list(served.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def _check_length(served: Served, num_characters: int, *, parameter: str) -> None:
    most = served.context * served.longest_token
    if num_characters > most:
        raise RefusedError(
            400,
            f"{parameter} must have up to {most} characters, got {num_characters}; the context has "
            f"{served.context} tokens",
            code="context_length_exceeded",
            parameter=parameter,
        )


def _visible(served: Served, request: Request) -> list[str]:
    """Return the models that a request's key may use.

    Raises:
        RefusedError: The key is none of those that are known, or a stranger's page asks.
    """
    if served.is_local:
        _check_local(request)
    names = list(served.worker.registry.sources)
    if not served.keys:
        return names
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    allowed: list[frozenset[str] | None] = []
    for key, models in served.keys.items():  # every key is compared, whichever it is
        if hmac.compare_digest(given, key.encode()):
            allowed.append(models)
    if not allowed:
        raise RefusedError(401, "the API key must be a known one", code="invalid_api_key")
    own = allowed[0]
    return names if own is None else [name for name in names if name in own]


def _check_local(request: Request) -> None:
    """Refuse what a page of another site asks, or one whose site's name was pointed here.

    Raises:
        RefusedError: The request's host or origin is another than this machine.
    """
    for name, start in (("host", "//"), ("origin", "")):
        given = request.headers.get(name)
        if given is not None and not _is_of_this_machine(start + given):
            raise RefusedError(
                403,
                f"{name} must be of this machine, got {given[:100]}; start the server with "
                "--api-key-file or --insecure to be asked from elsewhere",
            )


def _is_of_this_machine(address: str) -> bool:
    try:
        return is_loopback(urlsplit(address).hostname or "")
    except ValueError:
        return False


async def _body(request: Request) -> bytes:
    """Read a body of bounded size.

    Raises:
        RefusedError: It is larger, or does not come.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in _parts(request):
                content += part
                if len(content) > MAX_BODY_BYTES:
                    raise RefusedError(413, f"the body must have up to {MAX_BODY_BYTES} bytes")
    except TimeoutError as error:
        request.state.is_read = True  # nobody waits for the rest
        raise RefusedError(408, f"the body must come within {_BODY_SECONDS:g} s") from error
    return bytes(content)


async def _drain(request: Request) -> None:
    """Read what is left of a body, and forget it."""
    num_bytes = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for part in _parts(request):
                num_bytes += len(part)
                if num_bytes > _MAX_DRAINED_BYTES:
                    return
    except TimeoutError:
        return


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """Yield what has not been read of a body; once more, nothing where it has been."""
    while not getattr(request.state, "is_read", False):
        message = await request.receive()
        request.state.is_read = not message.get("more_body", False)
        yield message.get("body", b"")


def _check_model(name: str, visible: list[str]) -> None:
    if name not in visible:
        nearest = difflib.get_close_matches(name[:100], visible, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise RefusedError(
            404, f"model must be a served one, got {name[:100]}{hint}", code="model_not_found"
        )
