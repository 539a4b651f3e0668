"""From what was asked to what is sent: rows that are waited for, whole answers and streams."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from orchard.personal.writing import StopTexts
from orchard.serving.counting import Counts
from orchard.serving.engine import Row
from orchard.serving.protocol import Chat, RefusedError, StreamOptions
from orchard.serving.protocol import Request as Asked
from orchard.serving.shapes import Shapes, usage
from orchard.serving.text import Answer, Piece
from orchard.serving.values import RowValues
from orchard.serving.worker import Job, Worker

STALLED_SECONDS = 60.0
"""A stream whose reader takes nothing for so long is closed."""

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
        is_local: Whether those alone may ask who call this machine by a name of its own. A page of
            a stranger, opened in a browser here, comes from another.
        counts: Of what was answered.
        longest_token: Characters of the vocabulary's longest; a text of more than this for each
            token of the context is too long without being read.
    """

    worker: Worker
    tokenizer: Any
    encode_chat: Encode
    end_ids: frozenset[int]
    context: int
    vocabulary: int
    keys: Mapping[str, frozenset[str] | None]
    is_local: bool = False
    counts: Counts = field(default_factory=Counts)
    longest_token: int = 0

    def __post_init__(self) -> None:
        """Measure the vocabulary."""
        if not self.longest_token:
            longest = max(map(len, self.tokenizer.get_vocab()))
            object.__setattr__(self, "longest_token", longest)


@dataclass(eq=False)
class _Answering:
    """All answers to one request, while they are written.

    Attributes:
        jobs: One for each answer, prompts in order and each prompt's answers together.
        answers: What was read of each.
        heard: What the engine says, and None when nobody reads any more.
    """

    jobs: list[Job]
    answers: list[Answer]
    heard: asyncio.Queue[tuple[int, Row | Exception] | None]
    report: Callable[[Exception], None]

    def cancel(self) -> None:
        """Free the rows of what has not ended."""
        for job, answer in zip(self.jobs, self.answers, strict=True):
            if not answer.is_finished:
                job.cancel()

    async def pieces(self, request: Request) -> AsyncIterator[tuple[int, Piece]]:
        """Yield what is new of each answer, until all have ended or whoever asked has gone.

        Raises:
            RefusedError: A model cannot be served.
        """
        watch = asyncio.create_task(_until_gone(request))
        watch.add_done_callback(lambda task: self.heard.put_nowait(None))
        try:
            while not all(answer.is_finished for answer in self.answers):
                said = await self.heard.get()
                if said is None:
                    return
                number, what = said
                if isinstance(what, Exception):
                    # It names files of this machine: it is for its own log alone.
                    self.report(what)
                    model = self.jobs[number].model
                    raise RefusedError(500, f"{model} cannot be served; see the server's log")
                if (piece := self.answers[number].read(what)) is not None:
                    yield number, piece
        finally:
            watch.cancel()
            self.cancel()

    def num_written(self) -> int:
        """Return how many tokens were read."""
        return sum(answer.num_tokens for answer in self.answers)


async def _until_gone(request: Request) -> None:
    """Wait until whoever asked has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    """A stream that frees its rows however it ends, and does not wait for ever for its reader."""

    def __init__(self, events: AsyncIterator[str], answering: _Answering) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Message) -> None:
            await asyncio.wait_for(send(message), STALLED_SECONDS)

        try:
            await super().__call__(scope, receive, send_soon)
        finally:
            self._answering.cancel()


async def answer(
    served: Served, request: Request, asked: Asked, prompts: Sequence[Sequence[int]]
) -> Response:
    """Answer prompts, each as often as is asked.

    Raises:
        RefusedError: A prompt or what should follow it is too long, a token is none of the model's,
            the queue is full, or the model cannot be served.
    """
    is_chat = isinstance(asked, Chat)
    wanted = asked.tokens(256 if is_chat else 16)
    for prompt in prompts:
        _check_prompt(served, prompt, wanted)
    shapes = Shapes(asked.model, is_chat, bool(asked.stream), served.tokenizer, served.end_ids)
    is_echo = bool(getattr(asked, "echo", False))
    top = asked.num_top()
    answering = _begin(served, asked, prompts, wanted=wanted, top=top, is_echo=is_echo)
    told = _Told(served, answering, shapes, prompts, asked.copies(), top, is_echo)
    num_read = sum(map(len, prompts))
    served.counts.num_prompt_tokens += num_read
    if asked.stream:
        events = _events(told, request, asked.stream_options or StreamOptions(), num_read)
        return _Stream(events, answering)
    choices = await told.collected(request)
    if choices is None:
        return Response(status_code=499)  # nobody reads it
    sums = usage(num_read, answering.num_written())
    return JSONResponse(shapes.whole(choices, usage=sums))


def _check_prompt(served: Served, prompt: Sequence[int], wanted: int) -> None:
    if not prompt or len(prompt) + wanted > served.context:
        raise RefusedError(
            400,
            f"prompt and max_tokens must be 1..{served.context} tokens, got "
            f"{len(prompt)} and {wanted}",
            code="context_length_exceeded",
        )
    if not all(0 <= index < served.vocabulary for index in prompt):
        raise RefusedError(400, f"tokens must be in 0..{served.vocabulary - 1}", parameter="prompt")


def _begin(
    served: Served,
    asked: Asked,
    prompts: Sequence[Sequence[int]],
    *,
    wanted: int,
    top: int,
    is_echo: bool,
) -> _Answering:
    """Hand rows over to the engine."""
    loop = asyncio.get_running_loop()
    heard = asyncio.Queue[tuple[int, Row | Exception] | None]()
    seed = secrets.randbits(62) if asked.seed is None else abs(asked.seed) % 2**62

    def make(values: RowValues, *, prompt: Sequence[int], copy: int) -> Row:
        return Row(
            values,
            prompt,
            wanted,
            sampling=asked.sampling(),
            seed=seed + copy,
            end_ids=served.end_ids,
            num_top=top,
            scores_prompt=is_echo and top >= 0,
        )

    def tell(number: int, what: Row | Exception) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, (number, what))

    copies = [(prompt, copy) for prompt in prompts for copy in range(asked.copies())]
    jobs = [
        Job(asked.model, partial(make, prompt=prompt, copy=copy), partial(tell, number))
        for number, (prompt, copy) in enumerate(copies)
    ]
    if not served.worker.submit(jobs):
        raise RefusedError(429, "the queue is full; ask again later", code="queue_full")
    stops = StopTexts(tuple(asked.stops()))
    answers = [Answer(served.tokenizer, served.end_ids, stops) for _ in copies]
    report = partial(served.worker.registry.report, asked.model)
    return _Answering(jobs, answers, heard, report)


@dataclass
class _Told:
    """Choices as they are sent, from pieces of answers.

    Attributes:
        served: What is served.
        answering: Where pieces come from.
        shapes: What choices look like.
        prompts: What was asked.
        copies: Answers to each of these.
        top: Scores at each place; -1 = none.
        is_echo: Whether an answer begins with its prompt.
        offsets: Where the next token's text starts, by answer; those that have begun.
        last: When the last of each answer came.
        began: When it was asked.
    """

    served: Served
    answering: _Answering
    shapes: Shapes
    prompts: Sequence[Sequence[int]]
    copies: int
    top: int
    is_echo: bool
    offsets: dict[int, int] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    async def choices(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """Yield what is new, a choice at a time."""
        async for number, piece in self.answering.pieces(request):
            is_first = number not in self.offsets
            self._count(number, is_first=is_first)
            tokens: list[int] = list(piece.tokens)
            scores: list[Any] = list(piece.scores)
            text = piece.text
            if is_first and self.is_echo:
                prompt = self.prompts[number // self.copies]
                text = str(self.served.tokenizer.decode(prompt)) + text
                if self.top >= 0:
                    row = self.answering.jobs[number].row
                    assert row is not None, "a row was read"
                    tokens = [*prompt, *tokens]
                    scores = [None, *row.prompt_scores, *scores]
            logprobs = None
            offset = self.offsets.get(number, 0)
            if self.top >= 0:
                logprobs, offset = self.shapes.logprobs(tokens, scores, offset=offset)
            self.offsets[number] = offset
            yield self.shapes.choice(
                number, text, piece.finish, logprobs=logprobs, is_first=is_first
            )

    def _count(self, number: int, *, is_first: bool) -> None:
        now, counts = time.monotonic(), self.served.counts
        seconds = now - self.last.get(number, self.began)
        (counts.first_seconds if is_first else counts.between_seconds).add(seconds)
        self.last[number] = now

    async def collected(self, request: Request) -> list[dict[str, Any]] | None:
        """Return all choices when they have ended; None where whoever asked has gone."""
        whole: dict[int, dict[str, Any]] = {}
        async for new in self.choices(request):
            old = whole.setdefault(new["index"], new)
            if old is not new:
                _add(old, new)
        if not all(answer.is_finished for answer in self.answering.answers):
            return None
        return [whole[number] for number in sorted(whole)]


def _add(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Add what is new of a choice to what was there."""
    if "text" in old:
        old["text"] += new["text"]
    else:
        old["message"]["content"] += new["message"]["content"]
    old["finish_reason"] = new["finish_reason"]
    for name, values in (new["logprobs"] or {}).items():
        if values is not None:
            old["logprobs"][name] += values


async def _events(
    told: _Told, request: Request, options: StreamOptions, num_read: int
) -> AsyncIterator[str]:
    try:
        async for choice in told.choices(request):
            yield f"data: {json.dumps(told.shapes.whole([choice]))}\n\n"
    except RefusedError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    else:
        if options.include_usage:
            sums = usage(num_read, told.answering.num_written())
            yield f"data: {json.dumps(told.shapes.whole([], usage=sums))}\n\n"
    yield "data: [DONE]\n\n"
