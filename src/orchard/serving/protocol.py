"""What a request may ask for, checked, and what goes wrong, in OpenAI's form."""

from __future__ import annotations

from typing import Any

import msgspec

from orchard.personal.sampling import Sampling

MAX_BODY_BYTES = 4 * 2**20
_MAX_CHOICES, _MAX_PROMPTS, _MAX_STOPS, _MAX_TOP = 8, 64, 4, 20


class RefusedError(Exception):
    """A request that is not answered, with its status and what OpenAI calls the reason."""

    def __init__(self, status: int, message: str, *, code: str = "", parameter: str = "") -> None:
        """Say why."""
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


class Request(msgspec.Struct, kw_only=True):
    """What both kinds of completion have; other fields of OpenAI's are ignored."""

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

    def check(self, longest: int) -> None:
        """Check ranges.

        Raises:
            RefusedError: A value is out of range.
        """
        wanted = self.tokens(longest)
        if wanted < 0:
            raise RefusedError(400, f"max_tokens must be 0 or more, got {wanted}")
        if not 1 <= (self.n if self.n is not None else 1) <= _MAX_CHOICES:
            raise RefusedError(400, f"n must be in 1..{_MAX_CHOICES}, got {self.n}", parameter="n")
        if len(self.stops()) > _MAX_STOPS or any(not 0 < len(s) <= 200 for s in self.stops()):
            raise RefusedError(
                400,
                f"stop must be up to {_MAX_STOPS} texts of 1 to 200 characters, "
                f"got {len(self.stops())}",
                parameter="stop",
            )
        self.sampling()

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


class Completion(Request, kw_only=True):
    """A request to go on with text."""

    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each text or tokens.

        Raises:
            RefusedError: There is none, or there are too many.
        """
        given: Any = self.prompt
        if isinstance(given, list) and len({type(part) for part in given}) > 1:
            raise RefusedError(400, "prompt must be of one kind, got texts and tokens mixed")
        one = isinstance(given, str) or (given and isinstance(given[0], int))
        prompts = [given] if one else list(given)
        if not 1 <= len(prompts) <= _MAX_PROMPTS:
            raise RefusedError(400, f"prompt must be 1 to {_MAX_PROMPTS}, got {len(prompts)}")
        if self.logprobs is not None and not 0 <= self.logprobs <= _MAX_TOP:
            raise RefusedError(400, f"logprobs must be in 0..{_MAX_TOP}, got {self.logprobs}")
        return prompts


class Message(msgspec.Struct):
    """A turn of a conversation."""

    role: str
    content: str


class Chat(Request, kw_only=True):
    """A request to answer."""

    messages: list[Message]


def decode(content: bytes, kind: type[Request]) -> Any:
    """Read a request.

    Raises:
        RefusedError: It is no JSON, or lacks a field, or has one of another type.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RefusedError(400, f"the body must be JSON as documented, got: {error}") from error
