"""What a request may ask for, checked, and what goes wrong, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from orchard.personal.sampling import Sampling

MAX_BODY_BYTES = 4 * 2**20
_MAX_CHOICES, _MAX_PROMPTS, _MAX_ANSWERS, _MAX_STOPS, _MAX_TOP = 8, 64, 128, 16, 20


class RefusedError(Exception):
    """A request that is not answered, with its status and what OpenAI calls the reason."""

    def __init__(self, status: int, message: str, *, code: str = "", parameter: str = "") -> None:
        """Say why."""
        # What was asked may hold half of a surrogate pair, which no answer can carry.
        message = message.encode("utf-8", "replace").decode()
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.body = {
            "error": {
                "message": message,
                "type": "rate_limit_error" if status == 429 else kind,
                "param": parameter or None,
                "code": code or None,
            }
        }


class StreamOptions(msgspec.Struct):
    """What a stream says beside its text."""

    include_usage: bool = False


_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "logit_bias": (None, {}),
        "best_of": (None, 1),
        "suffix": (None, ""),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "function_call": (None, "none", "auto"),
        "reasoning_effort": (None, "none"),
        "functions": (None, []),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
    }
)
"""Fields of OpenAI's that would change an answer, and the values that change nothing."""


class Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of completion have.

    Fields that say only who asks, or how an answer is billed, are read and not used.
    """

    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    best_of: Any = None
    suffix: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    modalities: Any = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def check(self, longest: int) -> None:
        """Check ranges.

        Raises:
            RefusedError: A value is out of range.
        """
        wanted = self.tokens(longest)
        if wanted < 0:
            raise RefusedError(
                400, f"max_tokens must be 0 or more, got {wanted}", parameter="max_tokens"
            )
        if not 1 <= self.copies() <= _MAX_CHOICES:
            raise RefusedError(400, f"n must be in 1..{_MAX_CHOICES}, got {self.n}", parameter="n")
        if len(self.stops()) > _MAX_STOPS or any(not 0 < len(s) <= 200 for s in self.stops()):
            raise RefusedError(
                400,
                f"stop must be up to {_MAX_STOPS} texts of 1 to 200 characters, "
                f"got {len(self.stops())}",
                parameter="stop",
            )
        for name, neutral in _NEUTRAL.items():
            if getattr(self, name) not in neutral:
                raise RefusedError(
                    400,
                    f"{name} must be left out, got a value; it is not supported here",
                    code="unsupported_parameter",
                    parameter=name,
                )
        self.sampling()

    def copies(self) -> int:
        """Return how many answers each prompt gets."""
        return 1 if self.n is None else self.n

    def tokens(self, longest: int) -> int:
        """Return how many new tokens are asked for at most."""
        given = (self.max_completion_tokens, self.max_tokens)
        return next((number for number in given if number is not None), longest)

    def stops(self) -> list[str]:
        """Return the texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def sampling(self) -> Sampling:
        """Return how tokens are chosen.

        Raises:
            RefusedError: A value is out of range.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        try:
            return Sampling(temperature, 1.0 if self.top_p is None else self.top_p)
        except ValueError as error:
            name = str(error).partition(" ")[0]
            raise RefusedError(400, str(error), parameter=name) from error

    def num_top(self) -> int:
        """Return how many tokens are scored at each place; -1 = none is."""
        raise NotImplementedError


class Completion(Request, kw_only=True):
    """A request to go on with text."""

    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None
    echo: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each text or tokens.

        Raises:
            RefusedError: There is none, or there are too many.
        """
        given: Any = self.prompt
        if isinstance(given, list) and len({type(part) for part in given}) > 1:
            raise RefusedError(
                400, "prompt must be of one kind, got texts and tokens mixed", parameter="prompt"
            )
        one = isinstance(given, str) or (given and isinstance(given[0], int))
        prompts = [given] if one else list(given)
        if not 1 <= len(prompts) <= _MAX_PROMPTS:
            raise RefusedError(
                400, f"prompt must be 1 to {_MAX_PROMPTS}, got {len(prompts)}", parameter="prompt"
            )
        if len(prompts) * self.copies() > _MAX_ANSWERS:
            raise RefusedError(
                400,
                f"n times the number of prompts must be up to {_MAX_ANSWERS}, "
                f"got {len(prompts) * self.copies()}",
                parameter="n",
            )
        return prompts

    def num_top(self) -> int:
        """Return how many tokens are scored at each place; -1 = none is.

        Raises:
            RefusedError: Too many, or a negative number.
        """
        if self.logprobs is None:
            return -1
        return _checked_top(self.logprobs, "logprobs")


class Part(msgspec.Struct):
    """A part of a message; texts alone are read."""

    type: str
    text: str = ""


class Message(msgspec.Struct):
    """A turn of a conversation."""

    role: str
    content: str | list[Part]

    def speaker(self) -> str:
        """Return whose turn it is; what OpenAI calls a developer is the system of templates."""
        return "system" if self.role == "developer" else self.role

    def text(self) -> str:
        """Return what is said.

        Raises:
            RefusedError: A part is no text.
        """
        if isinstance(self.content, str):
            return self.content
        if other := [part.type for part in self.content if part.type != "text"]:
            raise RefusedError(
                400,
                f"content must be of parts of the type text, got {other[0][:40]}",
                parameter="messages",
            )
        return "".join(part.text for part in self.content)


class Chat(Request, kw_only=True):
    """A request to answer."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def num_top(self) -> int:
        """Return how many tokens are scored at each place; -1 = none is.

        Raises:
            RefusedError: Too many, a negative number, or one without ``logprobs``.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise RefusedError(
                400,
                "top_logprobs must come with logprobs, got it alone; set logprobs to true",
                parameter="top_logprobs",
            )
        if not self.logprobs:
            return -1
        return _checked_top(self.top_logprobs or 0, "top_logprobs")


def decode(content: bytes, kind: type[Request]) -> Any:
    """Read a request.

    Raises:
        RefusedError: It is no JSON, or lacks a field, or has an unknown one, one twice, or one of
            another type.
    """
    try:
        asked = msgspec.json.decode(content, type=kind)
        json.loads(content, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body must be JSON as documented, got: {error}") from error
    return asked


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twin[:40]} twice")
    return found


def _checked_top(number: int, name: str) -> int:
    if not 0 <= number <= _MAX_TOP:
        raise RefusedError(400, f"{name} must be in 0..{_MAX_TOP}, got {number}", parameter=name)
    return number
