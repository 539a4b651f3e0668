"""What sites answer, looked at before it counts: kept on disk, or refused and said so."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchard.communication.audit import AuditLog, content_digest
from orchard.communication.channel import Channel
from orchard.engine.exchange import Answer
from orchard.engine.inbox import Arrived, Inbox
from orchard.server.admission import Admission
from orchard.trees import Tree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What sites measured of models.

    Attributes:
        clients: Site to metric to value; sites whose values are no finite numbers are not in it.
        seconds: The longest that one of them took.
    """

    clients: Mapping[str, Mapping[str, float]]
    seconds: float


@dataclass(frozen=True)
class Intake:
    """Where answers of sites come in.

    Attributes:
        channel: Decodes updates, and counts their bytes.
        admission: Which updates are let in.
        base_digest: Of the base model, which every site must hold too.
        inbox: Keeps what was let in until it is aggregated.
        audit: Is told of both.
    """

    channel: Channel
    admission: Admission
    base_digest: str
    inbox: Inbox
    audit: AuditLog

    def admit(self, answer: Answer, shared: Tree, *, round_number: int) -> list[Arrived]:
        """Check what a site sent for a round and keep it on disk; none where it is refused.

        Args:
            answer: Of one site.
            shared: The global tree, whose names and shapes an update must have.
            round_number: Which round's task it answers.
        """
        reason = answer.failure or str(answer.header.get("refused", ""))
        base = answer.header.get("base_digest", self.base_digest)
        if not reason and base != self.base_digest:
            reason = f"base model must be {self.base_digest[:12]}, got {str(base)[:12]}"
        num_names = 0
        if not reason:
            try:
                self.admission.check_header(answer.body, shared)
                update = self.channel.unpack_update(answer.body)
                self.admission.check(
                    update, client_id=answer.site, round_number=round_number, shared=shared
                )
                num_names = len(update.delta)
            except ValueError as error:
                reason = str(error)
        if reason:
            self.refuse(answer.site, round_number, reason)
            return []
        self.channel.uplink_bytes += len(answer.body)
        arrived = self.inbox.put(answer.site, round_number, answer.body)
        self.audit.write(
            "received",
            site=answer.site,
            round=round_number,
            num_names=num_names,
            bytes=len(answer.body),
            sha256=content_digest(answer.body),
        )
        return [arrived]

    def refuse(self, site: str, round_number: int, reason: str) -> None:
        """Write down that something of a site was refused, and why."""
        self.audit.write("refused", site=site, round=round_number, reason=reason)
        log.warning("round %d, %s: %s", round_number, site, reason)

    def measured(
        self, sites: Sequence[str], headers: Mapping[str, Mapping[str, Any]], *, round_number: int
    ) -> Measured:
        """Read what sites measured of the models after a round; what is no number is refused."""
        clients: dict[str, dict[str, float]] = {}
        seconds = [0.0]
        for site in sites:
            header = headers.get(site, {})
            try:
                values = {str(k): float(v) for k, v in dict(header.get("evaluation", {})).items()}
                seconds.append(float(header.get("evaluation_seconds", 0.0)))
            except (TypeError, ValueError):
                values = {"": math.nan}
            if not all(math.isfinite(v) for v in (*values.values(), seconds[-1])):
                self.refuse(site, round_number, "evaluation must be finite numbers")
                seconds.pop()
            elif values:
                clients[site] = values
        return Measured(clients, max(seconds))
