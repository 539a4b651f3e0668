"""The one door: what comes over the network, in either direction, is read here and nowhere else.

Each kind of message has one type and one function that reads it. A type says what a field may be:
no text for a number, no ``true`` for 1, no 1.9 for a round, nothing that is not finite, nothing
beyond a stated range, no key that is not named. What does not fit is refused whole, before anything
is allocated for it. After the door a message is an object of a known type, and nobody converts.

The types are msgspec's. Beside pydantic in strict mode it refuses the same, and it takes a third of
the time to import, which a process that lives for one message pays each time; it reads a header of
thousands of tensors in C; and it needs no other package. What neither refuses, keys that stand
twice and depth, ``bounded_json.py`` does before.

This module imports no model code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from orchard.communication.bounded_json import read_json
from orchard.communication.readable import readable
from orchard.communication.refusals import explain
from orchard.communication.sum_messages import (
    EndTold,
    KeysTold,
    SharesTold,
    SumEnd,
    SumKeys,
    SumReply,
    SumShares,
    SumSurvivors,
    SumVector,
    SurvivorsTold,
    VectorTold,
)

MAX_HEADER_BYTES = 1 << 20
"""Longest header of a request or a reply, in bytes of JSON."""
MAX_LAYOUT_BYTES = 1 << 26
"""Longest header of an encoded message, which names its tensors; a task's own bound is lower."""
MAX_ROUND = 1_000_000
MAX_EXAMPLES = 10**12
MAX_SECONDS = 1e9
"""Of anything that a party says it took: 31 years."""
MAX_VALUE = 1e30
"""Largest magnitude of a number that was measured; sums of a million of them are finite."""
_LARGEST = 1.7976931348623157e308

SiteName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")]
Round = Annotated[int, Meta(ge=0, le=MAX_ROUND)]
Finite = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
Seconds = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
Digest = Annotated[str, Meta(min_length=1, max_length=128)]
RunName = Annotated[str, Meta(min_length=1, max_length=128)]
Recipe = Annotated[str, Meta(max_length=MAX_HEADER_BYTES // 2)]
Method = Annotated[str, Meta(min_length=1, max_length=300)]
Metric = Annotated[str, Meta(max_length=300)]
TensorName = Annotated[str, Meta(max_length=1000)]
Model = Literal["base", "global", "personal"]
Changed = Literal["data", "base", "consent"]


class MalformedError(ValueError):
    """A message that does not pass the door; its message says where, and repeats no value."""


class _Closed(Struct, frozen=True, forbid_unknown_fields=True):
    """What has these fields and no other."""


# What a coordinator asks of a site.


class Who(_Closed, frozen=True, tag_field="kind", tag="who"):
    """Asks a node without a key what it is called."""


class Alive(_Closed, frozen=True, tag_field="kind", tag="alive"):
    """Asks whether the site still works."""


class Join(_Closed, frozen=True, tag_field="kind", tag="join"):
    """Asks a site to take part in a run.

    Attributes:
        run: Names the run.
        recipe: As TOML.
        methods: Methods that do not come with Orchard, to the digests of their sources.
    """

    run: RunName
    recipe: Recipe
    methods: Annotated[dict[Method, Digest], Meta(max_length=16)] = {}


class RoundTask(_Closed, frozen=True, tag_field="kind", tag="round"):
    """Asks a site to evaluate and to train; the body is an encoded task.

    Attributes:
        run: See ``Join``.
        recipe: See ``Join``.
        site: Who is asked.
        index: Its place among the sites.
        num_clients: How many sites there are.
        round: The task's.
        evaluate: Models to evaluate before training.
        train: Whether to train.
        methods: See ``Join``.
    """

    run: RunName
    recipe: Recipe
    site: SiteName
    index: Annotated[int, Meta(ge=0, le=MAX_ROUND)]
    num_clients: Annotated[int, Meta(ge=1, le=MAX_ROUND)]
    round: Annotated[int, Meta(ge=1, le=MAX_ROUND)]
    evaluate: Annotated[list[Model], Meta(max_length=3)]
    train: bool
    methods: Annotated[dict[Method, Digest], Meta(max_length=16)] = {}


AnyRequest = (
    Who | Alive | Join | RoundTask | SumKeys | SumShares | SumVector | SumSurvivors | SumEnd
)


def read_request(header: object) -> AnyRequest:
    """Return what a coordinator asks.

    Raises:
        MalformedError: It is no request.
    """
    found: AnyRequest = _convert(header, AnyRequest, "request")
    return found


# What a site answers.


class Introduced(_Closed, frozen=True):
    """Answers ``Who`` and ``Alive``."""

    site: SiteName


class Failed(_Closed, frozen=True):
    """Answers anything: the site's worker could not.

    Attributes:
        error: Why, in words for a log.
    """

    error: Annotated[str, Meta(min_length=1)]


class Refused(_Closed, frozen=True):
    """Answers ``Join`` and ``RoundTask``: the site does not do that.

    Attributes:
        refused: Why: a code, or words for a log.
        option: The option that it is about.
        site: Who answers.
    """

    refused: Annotated[str, Meta(min_length=1)]
    option: Annotated[str, Meta(max_length=100, pattern=r"^[\w.-]*\Z")] = ""
    site: SiteName | None = None


class Joined(_Closed, frozen=True):
    """Answers ``Join``: the site takes part.

    Attributes:
        site: Who answers.
        num_examples: How many training examples it has, which bounds what it may weigh.
    """

    site: SiteName
    num_examples: Annotated[int, Meta(ge=0, le=MAX_EXAMPLES)] | None = None


class LacksValues(_Closed, frozen=True):
    """Answers ``RoundTask``: the site has lost what the task holds differences to."""

    lacks_values: bool
    site: SiteName | None = None

    def __post_init__(self) -> None:
        """Refuse what is said of nothing; msgspec makes it an error of the message."""
        if not self.lacks_values:
            raise ValueError("lacks_values must be true where it is there")


class RoundDone(_Closed, frozen=True):
    """Answers ``RoundTask``; the body is an encoded update where there was training.

    Attributes:
        base_digest: Of the base model that the site has.
        site: Who answers.
        evaluation: ``model/metric`` to value.
        evaluation_seconds: What measuring took.
        changed: What of the site is not as it was in the round before.
    """

    base_digest: Digest
    site: SiteName | None = None
    evaluation: Annotated[dict[Metric, Finite], Meta(max_length=1000)] = {}
    evaluation_seconds: Seconds = 0.0
    changed: Annotated[list[Changed], Meta(max_length=3)] = []


def read_introduction(header: object) -> Introduced:
    """Return who answers.

    Raises:
        MalformedError: It is no such answer.
    """
    found: Introduced = _convert(header, Introduced, "introduction")
    return found


def read_join_reply(header: object) -> Joined | Refused:
    """Return what a site answers when it is asked to join.

    Raises:
        MalformedError: It is no such answer.
    """
    kind = Refused if _has(header, "refused") else Joined
    found: Joined | Refused = _convert(header, kind, "reply")
    return found


def read_round_reply(header: object) -> RoundDone | Refused | LacksValues:
    """Return what a site answers to a round's task.

    Raises:
        MalformedError: It is no such answer.
    """
    kind: type[Struct] = RoundDone
    if _has(header, "refused"):
        kind = Refused
    elif _has(header, "lacks_values"):
        kind = LacksValues
    found: RoundDone | Refused | LacksValues = _convert(header, kind, "reply")
    return found


Told = TypeVar("Told", KeysTold, SharesTold, VectorTold, SurvivorsTold, EndTold)


def read_sum_reply(header: object, kind: type[Told]) -> Told | Refused:
    """Return what a site answers to one question of a secure sum.

    Raises:
        MalformedError: It is no such answer.
    """
    expected: type[SumReply | Refused] = Refused if _has(header, "refused") else kind
    found: Told | Refused = _convert(header, expected, "reply")
    return found


def read_failure(header: object) -> str:
    """Return why a site's worker could not answer, fit to be shown; empty where it could.

    Raises:
        MalformedError: It says that it could not, and not why.
    """
    if not _has(header, "error"):
        return ""
    found: Failed = _convert(header, Failed, "reply")
    return explain(found.error)


# What is written in the header of an encoded message.


class Tensor(_Closed, frozen=True):
    """Where a tensor stands in a message, as safetensors writes it."""

    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=1 << 48)]], Meta(max_length=16)]
    data_offsets: tuple[
        Annotated[int, Meta(ge=0, le=1 << 48)], Annotated[int, Meta(ge=0, le=1 << 48)]
    ]


class Settings(_Closed, frozen=True):
    """See ``messages.LocalSettings``."""

    steps: Annotated[int, Meta(ge=0, le=10**9)]
    epochs: Annotated[int, Meta(ge=0, le=10**9)]
    learning_rate: Annotated[float, Meta(ge=0, le=MAX_VALUE)]


class TaskHeader(_Closed, frozen=True, tag_field="kind", tag="task"):
    """See ``messages.Task``."""

    round_number: Round
    settings: Settings
    evaluate_local: bool
    since: Annotated[str, Meta(max_length=128)]


class UpdateHeader(_Closed, frozen=True, tag_field="kind", tag="update"):
    """See ``messages.Update``."""

    client_id: Annotated[str, Meta(max_length=10_000)]
    round_number: Round
    weight: dict[TensorName, Finite]
    metrics: Annotated[dict[Metric, Finite], Meta(max_length=10_000)]


def read_layout(buffer: bytes | bytearray, *, max_bytes: int = MAX_LAYOUT_BYTES) -> dict[str, Any]:
    """Return the JSON object at the start of a safetensors buffer.

    Args:
        buffer: The size of the header in 8 bytes, and the header; tensors may follow.
        max_bytes: Longest header that is read.

    Raises:
        MalformedError: There is none.
    """
    size = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or size > len(buffer) - 8:
        raise MalformedError(f"{len(buffer)} bytes claim a header of {size}")
    try:
        found = read_json(bytes(buffer[8 : 8 + size]), max_bytes=max_bytes)
    except ValueError as error:
        raise MalformedError(f"its header does not decode: {readable(str(error))}") from error
    if not isinstance(found, dict):
        raise MalformedError("its header is no JSON object")
    return found


def read_tensors(layout: Mapping[str, object]) -> dict[str, Tensor]:
    """Return where each tensor stands, from a safetensors header without its metadata.

    Raises:
        MalformedError: An entry is none of safetensors.
    """
    found: dict[str, Tensor] = _convert(layout, dict[TensorName, Tensor], "header")
    return found


Header = TypeVar("Header", TaskHeader, UpdateHeader)


def read_message_header(
    text: str, kind: type[Header], *, max_bytes: int = MAX_LAYOUT_BYTES
) -> Header:
    """Return what an encoded message says of itself, read from its metadata.

    Raises:
        MalformedError: It is no header of this kind.
    """
    try:
        found = read_json(text, max_bytes=max_bytes)
    except ValueError as error:
        raise MalformedError(readable(str(error))) from error
    header: Header = _convert(found, kind, "header")
    return header


def kind_of(text: str, *, max_bytes: int = MAX_LAYOUT_BYTES) -> str:
    """Return which kind of message a header says it is; empty where it does not say.

    Raises:
        MalformedError: It is no JSON object.
    """
    try:
        found = read_json(text, max_bytes=max_bytes)
    except ValueError as error:
        raise MalformedError(readable(str(error))) from error
    if not isinstance(found, dict):
        raise MalformedError("it is no JSON object")
    kind = found.get("kind", "")
    return readable(kind, limit=40) if isinstance(kind, str) else ""


def read_header_text(text: str) -> dict[str, Any]:
    """Return the JSON object that a request or a reply begins with; ``read_...`` says what it is.

    Raises:
        MalformedError: It is too long, too deep, or no JSON object.
    """
    try:
        found = read_json(text, max_bytes=MAX_HEADER_BYTES)
    except ValueError as error:
        raise MalformedError(f"header must be a JSON object: {readable(str(error))}") from error
    if not isinstance(found, dict):
        raise MalformedError("header must be a JSON object, got another type; check who sent it")
    return found


def _has(header: object, key: str) -> bool:
    return isinstance(header, Mapping) and key in header


_T = TypeVar("_T")


def _convert(value: object, kind: Any, what: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=True)
    # SystemError: msgspec 0.21 meets a whole number beyond every float.
    except (ValueError, SystemError, OverflowError, RecursionError) as error:
        reason = readable(str(error)) if isinstance(error, ValueError) else "a number out of range"
        raise MalformedError(
            f"{what} must have the fields of its kind, got one that is missing or wrong: "
            f"{reason}; check that both sides run the same version"
        ) from error
