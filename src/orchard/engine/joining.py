"""Waiting for the sites of a run to join it."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence

from orchard.communication import door
from orchard.communication.readable import readable
from orchard.communication.refusals import explain
from orchard.engine.exchange import Answer, Patience, Post, Request, exchange
from orchard.engine.intake import Intake
from orchard.engine.progress import Reporter

log = logging.getLogger(__name__)
_SAY_SECONDS = 30.0


def wait_for_sites(
    post: Post,
    request: Request,
    *,
    known: Mapping[str, int | None],
    expected: int,
    patience: Patience,
    intake: Intake,
    reporter: Reporter,
) -> dict[str, int | None]:
    """Ask every site that is online to join, and return those that did.

    With each goes how many examples it has; None where it does not say.

    Args:
        post: Carries requests.
        request: What a site is asked, which may refuse.
        known: The sites of a run that is resumed, to how many examples each joined with; no other
            is asked. Empty = anybody.
        expected: The wait ends when so many have joined.
        patience: How long is waited, and how few are enough.
        intake: Writes down who joined and who refused.
        reporter: Shows how many are there.

    Raises:
        TimeoutError: Too few joined in time.
    """
    end = time.monotonic() + patience.join_seconds
    joined: dict[str, int | None] = {}
    refused: dict[str, str] = {}
    # Whose answers ended the process; and a run that has begun goes on without who stays away now.
    barred = intake.inbox.set_apart_in(0)
    fewest = min(patience.quorum if known else max(patience.quorum, patience.wanted), expected)
    asked: set[str] = set()
    say_at = time.monotonic() + min(_SAY_SECONDS, patience.join_seconds / 2)

    def ask(online: Collection[str]) -> dict[str, Request]:
        """Return what sites are asked that came since: who is silent keeps nobody waiting."""
        nonlocal say_at
        if time.monotonic() >= say_at and len(joined) < expected:
            silent = sorted(asked - joined.keys() - refused.keys())
            _say(len(joined), expected, silent, left=end - time.monotonic())
            say_at = time.monotonic() + _SAY_SECONDS
        new = set(online) - joined.keys() - refused.keys() - asked - barred
        new = {site for site in new if not known or site in known}
        asked.update(new)
        return {site: request for site in sorted(new)}

    def is_settled() -> bool:
        """Say whether nobody else can join: of a run that has begun, each site said yes or no."""
        no_more = bool(known) and not known.keys() - joined.keys() - refused.keys() - barred
        return len(joined) >= expected or no_more

    while not is_settled() and time.monotonic() < end:
        reporter.working(f"{len(joined)} of {expected} sites joined", share=0.0)
        asked.clear()
        left = max(end - time.monotonic(), 0.0)
        for answer in exchange(post, ask(post.online()), patience, seconds=left, more=ask):
            if answer.failure:
                why = readable(answer.failure)
                log.warning("%s has not joined yet: %s", answer.site, why)
                asked.discard(answer.site)
                continue
            try:
                number = _read(answer, known)
            except ValueError as error:
                refused[answer.site] = readable(str(error))
                intake.refuse(answer.site, 0, str(error))
                continue
            joined[answer.site] = number
            intake.audit.write("joined", site=answer.site, round=0, num_examples=number)
            if is_settled():
                break  # one more that was asked and is silent keeps nobody waiting
        if not is_settled():
            time.sleep(patience.poll_seconds)
    if joined and fewest <= len(joined) < expected:
        log.warning("the run begins with %d of %d sites", len(joined), expected)
    if len(joined) < fewest or not joined:
        why = "; ".join(f"{site}: {reason}" for site, reason in sorted(refused.items()))
        raise TimeoutError(
            f"at least {max(fewest, 1)} sites must join within "
            f"{patience.join_seconds:g} seconds, got {len(joined)} of {expected}"
            f"{' (' + why + ')' if why else ''}; start more sites, raise "
            "deployment.join_seconds, or lower deployment.quorum"
        )
    return joined


def _say(num_joined: int, expected: int, silent: Sequence[str], *, left: float) -> None:
    """Say in the log whom the run waits for, and how long it will."""
    whom = "no other is online"
    if silent:
        whom = f"no answer yet of {readable(', '.join(silent))}"
    log.warning(
        "%d of %d sites joined, %s; waiting %.0f more seconds", num_joined, expected, whom, left
    )


def _read(answer: Answer, known: Mapping[str, int | None]) -> int | None:
    """Return how many examples a site joins with; None where it does not say.

    Raises:
        ValueError: It does not join, or is not the one that joined before.
    """
    reply = door.read_join_reply(answer.header)
    if isinstance(reply, door.Refused):
        raise ValueError(explain(reply.refused, reply.option))
    if reply.site != answer.site:
        raise ValueError(f"site must be {answer.site}, who was asked, got {reply.site}")
    before = known.get(answer.site)
    if before is not None and reply.num_examples != before:
        raise ValueError(
            f"site must have the {before} training examples that it joined the run with, got "
            f"{reply.num_examples}; bring back its data, or start another run"
        )
    return reply.num_examples
