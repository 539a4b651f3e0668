"""Whose message is read or aggregated, on disk while it is: who ends the process is known after.

An error is caught and laid at its update's door. What ends the process at once (the system's memory
killer, a fault in a library) leaves nothing to catch; so before each message is read, and each
update aggregated, a line says so, and the next process finds the line. One end says nothing, since
machines are switched off too: what the process ended in ``MAX_DEATHS`` times is set apart.

Where it ended while an update was added to others, that update is tried alone: whose memory the
others took is not to blame. Where the process ends only when updates are together, as in a kernel
that holds them all, one is left out at a time, one for each start, until a round comes to its end.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from orchard.engine.exchange import Post, Reply
from orchard.results import write_json

log = logging.getLogger(__name__)
JOURNAL_FILE = "journal.json"
MAX_DEATHS = 3
"""Ends of the process in one message, or in one round's aggregation, before something is done."""
_UNREAD, _BLOCK = "unread", 4096
_BESIDE = "+"  # no name of a site begins with it
_MUCH_BYTES = 16 << 20
Reading: TypeAlias = Callable[[str, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Blamed:
    """A message that the process ended in too often.

    Attributes:
        site: Whose.
        round_number: Which round's.
        path: Where it lies, if it was kept.
    """

    site: str
    round_number: int
    path: Path

    @property
    def reason(self) -> str:
        """Why it is set apart."""
        return f"the process ended {MAX_DEATHS} times while this was read or aggregated"


class Journal:
    """Says what the process is at, and remembers what earlier ones ended in.

    It is not flushed to disk: an end of the process loses nothing of it, and an end of the machine
    is nobody's fault.
    """

    def __init__(self, folder: Path) -> None:
        """Read what the last process was at, which ended there.

        Args:
            folder: Of the run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._unread = folder / JOURNAL_FILE, folder / "inbox" / _UNREAD
        saved = _read(self._path)
        self._deaths: dict[str, int] = saved.get("deaths", {})
        self._tried: list[str] = saved.get("tried", [])
        self._files: dict[str, str] = saved.get("files", {})
        # What lives alone and not beside others.
        self._cleared: list[str] = saved.get("cleared", [])
        # One write of a block costs microseconds, of which there are several for each message.
        now = self._path.with_suffix(".now")
        last = now.read_bytes().strip(b"\0 ") if now.exists() else b""
        self._file = os.open(now, os.O_WRONLY | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)
        self._now: dict[str, Any] | None = None
        self._combined: dict[str, Any] | None = None
        if last:
            try:
                self._count(json.loads(last))
            except (ValueError, LookupError):
                log.warning("what the last process was at is not known: %s does not read", now)
            self._note(None)

    def _count(self, last: Mapping[str, Any]) -> None:
        """Count the end of the process before, where it was."""
        own = _key(last["site"], last["round"])
        key = _beside(last["site"], last["round"]) if last.get("is_beside") else own
        self._deaths[key] = self._deaths.get(key, 0) + 1
        self._files[own] = last.get("file", "")
        if left_out := last.get("left_out"):
            self._tried.append(left_out)
        self._save()
        log.warning(
            "the last process ended in round %d, while %s; %d times so far",
            last["round"],
            f"a message of {last['site']} was read" if last["site"] else "updates were combined",
            self._deaths[key],
        )

    @contextmanager
    def reading(
        self, site: str, round_number: int, *, path: Path | None = None, message: bytes = b""
    ) -> Iterator[None]:
        """Say that a message is read, or added to others, until this ends.

        Args:
            site: Whose, as its key says.
            round_number: Which round's; 0 = of joining.
            path: Where it lies; None = not on disk yet.
            message: What is kept of it for the owner where the process ended in it before.
        """
        kept = path or self._unread / f"round_{round_number:06d}_{_UNREAD}_{site}"
        if message and path is None and self._deaths.get(_key(site, round_number)):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(message)
        with self._at({"site": site, "round": round_number, "file": kept.name}):
            yield

    @contextmanager
    def combining(self, round_number: int, *, left_out: str = "") -> Iterator[None]:
        """Say that the updates of a round are combined, without the one of a site that is tried."""
        self._combined = {"site": "", "round": round_number, "left_out": left_out}
        with self._at(self._combined):
            yield
        if left_out:
            self._begin_anew()  # it was found: none of the others is left out for it too

    def adding(self, site: str, path: Path, *, is_beside: bool) -> None:
        """Say that an update is read and added, until ``together`` or the next one.

        Args:
            site: Whose.
            path: Where it lies.
            is_beside: Whether there are others already.
        """
        own = {"site": site, "file": path.name, "is_beside": is_beside}
        self._note({**(self._combined or {}), **own})

    def together(self) -> None:
        """Say that all updates of ``combining`` are read."""
        self._note(self._combined)

    def suspect(self, round_number: int, sites: Sequence[str]) -> str:
        """Return whose update to leave out of a round in which the process ended; empty = nobody's.

        Args:
            round_number: The round.
            sites: Whose updates there are, the likeliest first.

        Raises:
            RuntimeError: The process ended whichever was left out; the next try begins anew.
        """
        ends = [self._deaths.get(_key("", round_number), 0)]
        ends += [self._deaths[key] for key in self._cleared if key in self._deaths]
        if max(ends) < MAX_DEATHS:
            return ""
        left = [site for site in sites if site not in self._tried]
        if not left:
            self._begin_anew()
            raise RuntimeError(
                f"updates of round {round_number} must be combined, got an end of the process "
                "whichever was left out; look at this machine's memory"
            )
        return left[0]

    def doubts(self, site: str, round_number: int) -> bool:
        """Say whether the process ended in an update beside others, and nobody tried it alone."""
        key = _beside(site, round_number)
        return key in self._deaths and key not in self._cleared

    def clear(self, site: str, round_number: int) -> None:
        """Say that the process lived through an update alone: what it ended in was not it alone."""
        self._cleared.append(_beside(site, round_number))
        self._save()

    def blamed(self) -> list[Blamed]:
        """Return the messages that the process ended in too often, each once."""
        found = []
        for key in list(self._files):
            round_number, _, site = key.partition("/")
            beside = _beside(site, int(round_number))
            number = self._deaths.get(key, 0)
            number += 0 if beside in self._cleared else self._deaths.get(beside, 0)
            if site and number >= MAX_DEATHS:
                name = self._files.pop(key)
                own = self._unread if f"_{_UNREAD}_" in name else self._unread.parent
                found.append(Blamed(site, int(round_number), own / name))
                self._deaths.pop(key, None)
                self._deaths.pop(beside, None)
        if found:
            self._save()
        return found

    def forget(self) -> None:
        """Begin anew, as after a round that is committed."""
        if self._unread.exists():
            for path in self._unread.iterdir():
                path.unlink(missing_ok=True)
        if self._deaths or self._tried:
            self._deaths, self._tried, self._files, self._cleared = {}, [], {}, []
            self._save()

    def _begin_anew(self) -> None:
        """Forget what the process ended in when updates were together."""
        for key in [key for key in self._deaths if key.endswith("/") or key in self._cleared]:
            del self._deaths[key]
        self._tried, self._cleared = [], []
        self._save()

    @contextmanager
    def _at(self, what: dict[str, Any]) -> Iterator[None]:
        before = self._now
        self._note(what)
        try:
            yield
        finally:
            self._note(before)

    def _note(self, what: dict[str, Any] | None) -> None:
        self._now = what
        text = json.dumps(what).encode() if what else b""
        assert len(text) <= _BLOCK, text
        os.pwrite(self._file, text.ljust(_BLOCK), 0)

    def _save(self) -> None:
        state = {"deaths": self._deaths, "tried": self._tried, "files": self._files}
        write_json(self._path, {**state, "cleared": self._cleared})


def num_tried(folder: Path) -> int:
    """Return how many updates a run's processes have left out in turn: each start is a step on."""
    return len(_read(folder / JOURNAL_FILE).get("tried", ()))


def num_ended(folder: Path) -> int:
    """Return how often a run's processes ended in a site's message in this round.

    Of each site's they do ``MAX_DEATHS`` times at most, so that sites which take turns are found.
    """
    deaths: dict[str, int] = _read(folder / JOURNAL_FILE).get("deaths", {})
    return sum(number for key, number in deaths.items() if not key.endswith("/"))


def _key(site: str, round_number: int) -> str:
    return f"{round_number}/{site}"


def _beside(site: str, round_number: int) -> str:
    return _key(_BESIDE + site, round_number)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return found


@dataclass
class WatchedPost:
    """A post that says in the journal whose reply it takes from the network.

    Attributes:
        post: Carries requests.
        reading: Of the journal.
    """

    post: Post
    reading: Reading
    _asked: dict[str, tuple[str, int]] = field(default_factory=dict)

    def online(self) -> frozenset[str]:
        """Return the names of the sites that can be asked now."""
        return self.post.online()

    def send(self, site: str, header: Mapping[str, Any], body: bytes) -> str:
        """Send a request, and return a ticket for its reply."""
        ticket = self.post.send(site, header, body)
        self._asked[ticket] = site, int(header.get("round", 0))
        return ticket

    def collect(self, tickets: Collection[str]) -> list[Reply]:
        """Return replies to these tickets that are there, each once, and no more than is much.

        Large ones are left where they are until those before them have been taken: what this
        process holds does not grow with the number of sites.
        """
        replies: list[Reply] = []
        for ticket in tickets:
            replies += self._take(ticket)
            if sum(len(reply.body) for reply in replies) >= _MUCH_BYTES:
                return replies
        if replies:
            # What came meanwhile for those that were looked at first.
            there = {reply.ticket for reply in replies}
            replies += [own for t in tickets if t not in there for own in self._take(t)]
        return replies

    def _take(self, ticket: str) -> list[Reply]:
        site, number = self._asked.get(ticket, ("", 0))
        if not site:
            return self.post.collect([ticket])
        with self.reading(site, number):
            replies = self.post.collect([ticket])
        if replies:
            del self._asked[ticket]
        return replies
