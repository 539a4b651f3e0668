"""Sites that answer after their round, and how it is known that one never will."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from orchard.engine.exchange import Patience, Reply, Request, exchange
from orchard.engine.stragglers import Stragglers


class Box:
    """A post with the replies that a test puts in, of sites that are all online."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply] = {}
        self.probes: list[str] = []

    def online(self) -> frozenset[str]:
        return frozenset({"a", "b"})

    def send(self, site: str, header: Mapping[str, Any], body: bytes) -> str:
        assert header == {"kind": "alive"}
        self.probes.append(site)
        return f"probe {len(self.probes)}"

    def collect(self, tickets: Collection[str]) -> list[Reply]:
        return [self.replies.pop(ticket) for ticket in tickets if ticket in self.replies]

    def put(self, ticket: str, **facts: Any) -> None:
        self.replies[ticket] = Reply(ticket, **facts)


def late_sites() -> tuple[Stragglers, Box]:
    stragglers = Stragglers()
    stragglers.add({"one": "a", "two": "b"}, round_number=3)
    return stragglers, Box()


def test_an_answer_comes_with_its_round_and_frees_its_site() -> None:
    stragglers, box = late_sites()
    box.put("one", body=b"update")
    (found,) = stragglers.collect(box)
    assert (found.site, found.round_number, found.reply.body) == ("a", 3, b"update")
    assert stragglers.busy == {"b"}
    assert box.probes == ["b"]


def test_an_answer_that_is_an_error_is_one_too() -> None:
    stragglers, box = late_sites()
    stragglers.collect(box)
    box.put("one", error="out of memory")
    (found,) = stragglers.collect(box)
    assert (found.site, found.reply.error) == ("a", "out of memory")
    assert stragglers.busy == {"b"}


def test_whoever_answers_its_probe_alone_has_lost_the_request() -> None:
    stragglers, box = late_sites()
    stragglers.collect(box)
    assert box.probes == ["a", "b"]
    box.put("probe 1")
    assert stragglers.collect(box) == []
    assert stragglers.busy == {"b"}


def test_a_probe_that_does_not_arrive_says_nothing_and_is_sent_again() -> None:
    stragglers, box = late_sites()
    stragglers.collect(box)
    box.put("probe 2", error="unreachable")
    assert stragglers.collect(box) == []
    assert stragglers.busy == {"a", "b"}
    assert box.probes == ["a", "b", "b"]


def test_an_answer_together_with_its_probes_is_not_lost() -> None:
    stragglers, box = late_sites()
    stragglers.collect(box)
    box.put("probe 1")
    box.put("one", body=b"update")
    assert [found.reply.body for found in stragglers.collect(box)] == [b"update"]
    assert stragglers.busy == {"b"}


class Forgetful(Box):
    """Sites that say of every request at once that it is lost."""

    def send(self, site: str, header: Mapping[str, Any], body: bytes) -> str:
        ticket = f"{site} {len(self.probes)}"
        self.probes.append(site)
        self.put(ticket, error="gone", is_lost=True)
        return ticket


def test_who_loses_every_request_is_asked_ever_more_rarely() -> None:
    """Each time costs the whole body; an hour long it was sent at every look."""
    box, now = Forgetful(), [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    patience = Patience(poll_seconds=0.5, probe_seconds=30.0)
    answers = list(
        exchange(
            box,
            {"a": Request({"kind": "round"}, b"body")},
            patience,
            seconds=3600.0,
            clock=lambda: now[0],
            sleep=sleep,
        )
    )
    assert [answer.site for answer in answers] == ["a"]
    assert answers[0].failure
    assert 100 < len(box.probes) < 140  # not 7200, and never given up
