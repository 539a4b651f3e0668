"""Waiting for the sites of a run to join it."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from orchard.engine.exchange import Patience, Post, Request, exchange
from orchard.engine.intake import Intake
from orchard.engine.progress import Reporter

log = logging.getLogger(__name__)


def wait_for_sites(
    post: Post,
    request: Request,
    *,
    known: Collection[str],
    expected: int,
    patience: Patience,
    intake: Intake,
    reporter: Reporter,
) -> set[str]:
    """Ask every site that is online to join, and return those that did.

    Args:
        post: Carries requests.
        request: What a site is asked, which may refuse.
        known: The sites of a run that is resumed; no other is asked. Empty = anybody.
        expected: The wait ends when so many have joined.
        patience: How long is waited, and how few are enough.
        intake: Writes down who joined and who refused.
        reporter: Shows how many are there.

    Raises:
        TimeoutError: Too few joined in time.
    """
    end = time.monotonic() + patience.join_seconds
    joined: set[str] = set()
    refused: dict[str, str] = {}
    while len(joined) < expected and time.monotonic() < end:
        reporter.working(f"{len(joined)} of {expected} sites joined", share=0.0)
        new = post.online() - joined - refused.keys()
        asked = {site: request for site in sorted(new) if not known or site in known}
        for answer in exchange(post, asked, patience, seconds=max(end - time.monotonic(), 0.0)):
            if answer.failure:
                log.warning("%s has not joined yet: %s", answer.site, answer.failure)
            elif reason := str(answer.header.get("refused", "")):
                refused[answer.site] = reason
                intake.refuse(answer.site, 0, reason)
            else:
                joined.add(answer.site)
                intake.audit.write("joined", site=answer.site, round=0)
        if len(joined) < expected:
            time.sleep(patience.poll_seconds)
    if len(joined) < min(patience.quorum, expected) or not joined:
        why = "; ".join(f"{site}: {reason}" for site, reason in sorted(refused.items()))
        raise TimeoutError(
            f"at least {max(patience.quorum, 1)} sites must join within "
            f"{patience.join_seconds:g} seconds, got {len(joined)} of {expected}"
            f"{' (' + why + ')' if why else ''}; start more sites, raise "
            "deployment.join_seconds, or lower deployment.quorum"
        )
    return joined
