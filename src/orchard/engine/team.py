"""A crew of several workers, each with a warm model of its own.

Clients are given out in their order to whoever is free, and what came of them is passed on in their
order, so that sums have the bits of one process. A worker that dies is replaced, and its client has
its turn again: what it keeps is on disk by round, so it is what it would have been.

What all clients are sent is a file that every worker reads; what each sends back comes with the
answer. Nothing here knows where a worker runs: a ``Place`` is asked, and answers.
"""

from __future__ import annotations

import builtins
import json
import logging
import os
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from orchard.communication.channel import Broadcast
from orchard.communication.messages import decode_task
from orchard.engine.turns import Tell, Turn, WorkerFacts, common_part, still_wanted
from orchard.engine.worker import Header
from orchard.results import Metrics, write_atomically
from orchard.trees import Tree

log = logging.getLogger(__name__)
_WHOLE, _SINCE = "task.whole", "task.since"
_WINDOW = 2  # clients of each worker that may be ready before they are asked for


class Place(Protocol):
    """Where one worker is."""

    @property
    def num_restarts(self) -> int:
        """How often another process took its place."""
        ...

    def ask(self, header: Header, body: bytes) -> tuple[Header, bytes]:
        """Have a request answered, by another process where the first one dies of it.

        Raises:
            ChildProcessError: No process lived through it.
        """
        ...


@dataclass(frozen=True)
class Member:
    """A client, as far as who gives it out needs to know it.

    Attributes:
        client_id: Its name.
        tests: The same for clients with the same held-out examples.
    """

    client_id: str
    tests: int


@dataclass(frozen=True)
class Base:
    """What workers say of the model that they hold.

    Attributes:
        digest: SHA-256 of its tensors.
        fresh: Its adapters as they begin.
        learning_rate: Of the first round.
        notes: A sentence for each fast way that it cannot go.
    """

    digest: str
    fresh: Tree
    learning_rate: float
    notes: tuple[str, ...]


class Team:
    """A crew whose clients have their turns in workers."""

    def __init__(self, places: Sequence[Place], members: Sequence[Member], *, room: Path) -> None:
        """Give the clients to these workers.

        Args:
            places: One for each worker.
            members: All clients, in their order.
            room: A folder that every worker reads, where tasks are put.
        """
        self._places, self._members, self._room = places, members, room
        self._facts = [WorkerFacts() for _ in places]

    @property
    def client_ids(self) -> Sequence[str]:
        """The clients, in their order."""
        return [member.client_id for member in self._members]

    @property
    def workers(self) -> Sequence[WorkerFacts]:
        """What each worker has done and needed so far."""
        return list(self._facts)

    def begin(self) -> Base:
        """Let every worker load the model, and return what it is.

        Raises:
            ValueError: Workers have different models.
        """
        kind = {"kind": "begin"}
        found = list(self._each(lambda place: self._ask(place, kind)))
        digests = sorted({str(header["base_digest"]) for header, _ in found})
        if len(digests) > 1:
            raise ValueError(
                f"model.path must hold the same model for every worker, got bases {digests[0][:12]}"
                f" and {digests[1][:12]}; copy one to all nodes"
            )
        header, body = found[0]
        notes = tuple(str(note) for note in header["notes"])
        return Base(digests[0], decode_task(body).shared, float(header["learning_rate"]), notes)

    def is_unchanged(self) -> bool:
        """Say whether the base of every worker still has the tensors that it was loaded with."""
        kind = {"kind": "end"}
        found = list(self._each(lambda place: self._ask(place, kind)))
        return all(bool(header["base_is_unchanged"]) for header, _ in found)

    def train(
        self, cohort: Sequence[str], broadcast: Broadcast, holders: Collection[str], tell: Tell
    ) -> Iterator[Turn]:
        """Let workers train the cohort, and yield the turns in its order."""
        self._put(_WHOLE, broadcast.whole)
        has_differences = broadcast.differences is not None
        if has_differences:
            self._put(_SINCE, broadcast.since)

        def turn(number: int, client_id: str) -> Turn:
            asked = {
                "kind": "train",
                "client": client_id,
                "round": broadcast.task.round_number,
                "has_values": has_differences and client_id in holders,
            }
            header, body = self._ask(number, asked)
            return Turn(client_id, body, int(header["downlink_bytes"]), number)

        what = self._what("trained", len(cohort))
        yield from self._told(self._spread(cohort, turn), tell, what)

    def evaluate(
        self, message: bytes, models: Collection[str], tell: Tell
    ) -> Iterator[tuple[str, Metrics]]:
        """Let workers evaluate all clients, and yield what they measured in their order.

        One of those with the same examples measures what is the same for all of them, first.
        """
        self._put(_WHOLE, message)
        numbers: dict[int, int] = {}
        for member in self._members:
            numbers[member.tests] = numbers.get(member.tests, 0) + 1
        first = list({member.tests: member for member in reversed(self._members)}.values())
        shared = [member for member in first if numbers[member.tests] > 1]
        common: dict[int, dict[str, float]] = {}

        def test(number: int, member: Member) -> tuple[str, dict[str, float]]:
            known = common.get(member.tests, {})
            asked = {
                "kind": "evaluate",
                "client": member.client_id,
                "models": sorted(still_wanted(models, known)),
                "known": json.dumps(known),
            }
            header, _ = self._ask(number, asked)
            return member.client_id, json.loads(str(header["measured"]))

        done = dict(self._spread(shared, test))
        common |= {m.tests: common_part(done[m.client_id]) for m in shared}
        rest = [member for member in self._members if member.client_id not in done]
        what = self._what("evaluated", len(self._members))
        others = self._told(self._spread(rest, test), tell, what, num_done=len(done))
        for member in self._members:
            own = done.pop(member.client_id, None)
            yield (member.client_id, own) if own is not None else next(others)

    def _put(self, name: str, content: bytes) -> None:
        write_atomically(self._room / name, content)

    def _what(self, verb: str, total: int) -> Callable[[int], str]:
        def say(num_done: int) -> str:
            memory = ", ".join(f"{own.now_bytes / 1e9:.1f}" for own in self._facts)
            return f"{num_done} of {total} {verb}; workers have {memory} GB"

        return say

    @staticmethod
    def _told(
        results: Iterator[_Result], tell: Tell, what: Callable[[int], str], num_done: int = 0
    ) -> Iterator[_Result]:
        tell(what(num_done), num_done)
        for number, result in enumerate(results, start=num_done + 1):
            tell(what(number), number)
            yield result
            del result

    def _ask(self, number: int, asked: Header) -> tuple[Header, bytes]:
        """Ask one worker, and raise here what it raised there."""
        place = self._places[number]
        header, body = place.ask(asked, b"")
        self._facts[number] = replace(
            self._facts[number],
            num_turns=self._facts[number].num_turns + (asked["kind"] in ("train", "evaluate")),
            peak_bytes=int(header["peak_bytes"]),
            now_bytes=int(header["now_bytes"]),
            num_restarts=place.num_restarts,
        )
        if "raised" in header:
            raise _raised_here(header["raised"])
        return header, body

    def _each(self, ask: Callable[[int], _Result]) -> Iterator[_Result]:
        """Do something once with every worker, all at the same time."""
        numbers = range(len(self._places))
        results: _Results[_Result] = _Results(len(self._places), window=len(self._places))
        for number in numbers:
            _start(results.fill, number, partial(ask, number))
        yield from results.in_order()

    def _spread(
        self, jobs: Sequence[_Job], do: Callable[[int, _Job], _Result]
    ) -> Iterator[_Result]:
        """Give jobs to workers as they are free, and yield results in the order of the jobs."""
        results: _Results[_Result] = _Results(len(jobs), window=_WINDOW * len(self._places))

        def work(number: int) -> None:
            while (index := results.next_index()) is not None:
                results.fill(index, partial(do, number, jobs[index]))

        try:
            for number in range(min(len(self._places), len(jobs))):
                _start(work, number)
            yield from results.in_order()
        finally:
            results.stop()


_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def _start(target: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


class _Results(Generic[_Result]):
    """Results that come in any order and are taken in theirs, few at a time."""

    def __init__(self, number: int, *, window: int) -> None:
        self._number, self._window = number, window
        self._next, self._taken, self._is_over = 0, 0, False
        self._found: dict[int, _Result | BaseException] = {}
        self._changed = threading.Condition()

    def next_index(self) -> int | None:
        """Return the next job, once those before it have been taken; None when there is none."""
        with self._changed:
            while not self._is_over and self._next < self._number:
                if self._next < self._taken + self._window:
                    self._next += 1
                    return self._next - 1
                self._changed.wait()
            return None

    def fill(self, index: int, make: Callable[[], _Result]) -> None:
        """Make one result; what it raises is raised where it is taken."""
        try:
            found: _Result | BaseException = make()
        except BaseException as error:
            found = error
        with self._changed:
            self._found[index] = found
            self._changed.notify_all()

    def in_order(self) -> Iterator[_Result]:
        """Yield each result when it is there, and keep none."""
        for index in range(self._number):
            with self._changed:
                while index not in self._found:
                    self._changed.wait()
                self._taken = index + 1
                self._changed.notify_all()
                found = self._found.pop(index)
            if isinstance(found, BaseException):
                raise found
            # Who takes it is the only one to have it.
            last: list[_Result] = [found]
            del found
            yield last.pop()

    def stop(self) -> None:
        """Give out no more jobs."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


class _ThereError(Exception):
    """Where an error was raised in another process, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def raised_there(error: BaseException) -> dict[str, Any]:
    """Return an error as JSON values, for ``_raised_here``."""
    return {
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "text": str(error),
        "notes": list(getattr(error, "__notes__", ())),
        "trace": "".join(traceback.format_exception(error)),
    }


def _raised_here(raised: Any) -> Exception:
    """Return an error that a worker raised, of the nearest kind that Python itself has."""
    kinds, text = list(raised["kinds"]), str(raised["text"])
    if kinds[0] == "OutOfMemoryError":
        kinds.insert(0, "MemoryError")
    error: Exception = RuntimeError(f"{kinds[0]}: {text}")
    for name in kinds:
        kind = getattr(builtins, name, None)
        if kind in (Exception, BaseException, object):
            break
        if isinstance(kind, type) and issubclass(kind, Exception):
            with suppress(TypeError):  # a kind that is made of more than a text
                error = kind(text)
                break
    for note in raised["notes"]:
        error.add_note(str(note))
    error.__cause__ = _ThereError(str(raised["trace"]))
    return error


def read_task_file(room: Path, *, is_since: bool = False) -> bytes:
    """Return what all clients are sent now."""
    return (room / (_SINCE if is_since else _WHOLE)).read_bytes()


def clear_room(room: Path) -> None:
    """Remove what is left of tasks."""
    for name in (_WHOLE, _SINCE):
        (room / name).unlink(missing_ok=True)
    with suppress(OSError):
        os.rmdir(room)
