"""One exchange with many sites: every wait is bounded, and what is lost is asked again.

Nothing here knows Flower. A ``Post`` carries requests to sites and brings back what they answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchard.communication.readable import readable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """How long is waited for what, and what happens then.

    Attributes:
        join_seconds: For sites to join before a run begins.
        round_seconds: For the answers of one round.
        probe_seconds: After so long without an answer a site is asked whether it still works.
        quorum: Fewest updates of a round that counts.
        wanted: Updates that a round is tried for again while there are tries and time left, before
            ``quorum`` is enough, and fewest sites that begin a run; 0 = ``quorum``.
        attempts: How often one site is asked, and one round is tried.
        accept_late: Whether an answer that came after its round counts in the next one.
        staleness: What it counts then, to the power of the rounds that it is late, in (0, 1].
        poll_seconds: Between looks at the post.
        sum_seconds: For the answers to one question of a secure sum.
    """

    join_seconds: float = 600.0
    round_seconds: float = 3600.0
    probe_seconds: float = 30.0
    quorum: int = 1
    wanted: int = 0
    attempts: int = 3
    accept_late: bool = False
    staleness: float = 0.5
    poll_seconds: float = 0.5
    sum_seconds: float = 120.0


@dataclass(frozen=True)
class Reply:
    """What came back for one request.

    Attributes:
        ticket: Of the request.
        header: JSON values.
        body: An encoded message, or nothing.
        error: Why there is no answer; empty where there is one.
        is_lost: The request may never have arrived; asking again is right.
    """

    ticket: str
    header: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    error: str = ""
    is_lost: bool = False


class Post(Protocol):
    """Carries requests to sites."""

    def online(self) -> frozenset[str]:
        """Return the names of the sites that can be asked now."""
        ...

    def send(self, site: str, header: Mapping[str, Any], body: bytes) -> str:
        """Send a request, and return a ticket for its reply."""
        ...

    def collect(self, tickets: Collection[str]) -> list[Reply]:
        """Return replies to these tickets that are there, each once; at least one if any is."""
        ...


@dataclass(frozen=True)
class Request:
    """What one site is asked.

    Attributes:
        header: JSON values.
        body: An encoded message, or nothing.
    """

    header: Mapping[str, Any]
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What one site answered in time, or why it did not.

    Attributes:
        site: Who.
        header: JSON values; empty where there is no answer.
        body: An encoded message, or nothing.
        failure: Empty, or the reason.
    """

    site: str
    header: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    failure: str = ""


@dataclass
class _Pending:
    request: Request
    ticket: str = ""
    sent_at: float = 0.0
    probe: str = ""
    attempts: int = 0
    losses: int = 0
    wait_until: float = 0.0


def exchange(
    post: Post,
    requests: Mapping[str, Request],
    patience: Patience,
    *,
    seconds: float,
    late: dict[str, str] | None = None,
    more: Callable[[Collection[str]], Mapping[str, Request]] = lambda online: {},
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Answer]:
    """Ask sites, and yield each one's answer or failure as it comes, once per site.

    A site that is offline is asked when it comes back. Where an answer stays away, the site is
    probed; sites handle one request after another, so a probe that is answered first says that
    the request was lost, and it is sent again.

    Args:
        post: Carries the requests.
        requests: Site to what it is asked.
        patience: How long is waited, and how often a site is asked.
        seconds: Until the deadline of the whole exchange.
        late: Ticket to site of requests that were not answered at the deadline are put here.
        more: From the sites that are online now to what is asked beside, of sites that are not
            being asked; so nobody who does not answer keeps others from being asked.
        clock: Seconds, monotonic.
        sleep: Waits for some seconds.
    """
    deadline = clock() + seconds
    pending = {site: _Pending(request) for site, request in requests.items()}
    while pending:
        now = clock()
        online = post.online()
        pending |= {site: _Pending(request) for site, request in more(online).items()}
        for site, own in pending.items():
            if not own.ticket and site in online and now >= own.wait_until:
                own.ticket = post.send(site, own.request.header, own.request.body)
                own.sent_at, own.attempts = now, own.attempts + 1
            elif own.ticket and not own.probe and now - own.sent_at > patience.probe_seconds:
                if site in online:
                    own.probe = post.send(site, {"kind": "alive"}, b"")
                else:
                    own.sent_at = now
        settled = _collect(post, pending, patience, clock())
        has_come = bool(settled)
        while settled:
            del pending[settled[0].site]
            # Whoever takes an answer is the only one to have it.
            yield settled.pop(0)
        if clock() >= deadline:
            break
        # Where something came, more may be there already: much is brought a part at a time.
        if pending and not has_come:
            sleep(patience.poll_seconds)
    for site, own in pending.items():
        if own.ticket and late is not None:
            late[own.ticket] = site
        where = "did not answer" if own.ticket else "was not online"
        yield Answer(site, failure=f"{site} {where} within {seconds:g} seconds")


def _collect(
    post: Post, pending: dict[str, _Pending], patience: Patience, now: float
) -> list[Answer]:
    """Take what came, ask again what was lost, and return what is settled."""
    of_ticket = {own.ticket: site for site, own in pending.items() if own.ticket}
    of_probe = {own.probe: site for site, own in pending.items() if own.probe}
    settled = []
    # A reply that comes with its probe's is in the same batch: replies settle first.
    replies = {reply.ticket: reply for reply in post.collect([*of_ticket, *of_probe])}
    for ticket, site in of_ticket.items():
        reply, own = replies.get(ticket), pending[site]
        if reply is None:
            continue
        if not reply.error:
            settled.append(Answer(site, reply.header, reply.body))
        elif own.attempts >= patience.attempts and not reply.is_lost:
            settled.append(Answer(site, failure=reply.error))
        else:
            # What is lost costs no attempt, so that whoever says so again and again is asked ever
            # more rarely.
            tries = own.losses if reply.is_lost else own.attempts
            wait = patience.poll_seconds * 2 ** min(tries, 30) if tries else 0.0
            wait = min(wait, max(patience.probe_seconds, patience.poll_seconds))
            why = readable(reply.error)
            log.warning("%s: %s; asking again in %.1f seconds", site, why, wait)
            pending[site] = _Pending(
                own.request,
                attempts=own.attempts - reply.is_lost,
                losses=own.losses + reply.is_lost,
                wait_until=now + wait,
            )
    done = {answer.site for answer in settled}
    for ticket, site in of_probe.items():
        if ticket not in replies or site in done or pending[site].probe != ticket:
            continue
        own = pending[site]
        if replies[ticket].error:
            own.probe, own.sent_at = "", now
            continue
        # The probe may have overtaken the reply by one look.
        last = post.collect([own.ticket])
        if last and not last[0].error:
            settled.append(Answer(site, last[0].header, last[0].body))
            continue
        log.warning("%s lost the request it was sent; asking again", site)
        pending[site] = _Pending(own.request, attempts=own.attempts - 1, losses=own.losses)
    return settled
