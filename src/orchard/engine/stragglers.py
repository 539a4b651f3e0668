"""Requests whose round went on without their answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchard.engine.exchange import Post, Reply


@dataclass
class _Late:
    site: str
    round_number: int
    probe: str = ""


@dataclass(frozen=True)
class LateReply:
    """An answer after its round's deadline.

    Attributes:
        site: Who answers.
        round_number: The round that it answers.
        reply: What came.
    """

    site: str
    round_number: int
    reply: Reply


@dataclass
class Stragglers:
    """Sites that still work on an earlier round, or have lost it."""

    _late: dict[str, _Late] = field(default_factory=dict)

    @property
    def busy(self) -> frozenset[str]:
        """Sites that are not to be asked for more now."""
        return frozenset(late.site for late in self._late.values())

    def add(self, tickets: Mapping[str, str], *, round_number: int) -> None:
        """Remember requests of a round, ticket to site, that were not answered in time."""
        self._late |= {ticket: _Late(site, round_number) for ticket, site in tickets.items()}

    def collect(self, post: Post) -> list[LateReply]:
        """Return what came since, and forget what a site's answer to a probe says is lost."""
        probes = {late.probe: ticket for ticket, late in self._late.items() if late.probe}
        found = []
        # Sorted: an answer that comes together with its probe's is not lost.
        replies = post.collect([*self._late, *probes])
        for reply in sorted(replies, key=lambda reply: reply.ticket in probes):
            late = self._late.get(probes.get(reply.ticket, reply.ticket))
            if late is None:
                continue
            if reply.ticket in probes and reply.error:
                late.probe = ""
                continue
            del self._late[probes.get(reply.ticket, reply.ticket)]
            if reply.ticket not in probes:
                found.append(LateReply(late.site, late.round_number, reply))
        online = post.online()
        for late in self._late.values():
            if not late.probe and late.site in online:
                late.probe = post.send(late.site, {"kind": "alive"}, b"")
        return found
