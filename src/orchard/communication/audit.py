"""An append-only log of what crossed the network: what was asked, sent, received and refused.

Every line has the hash of the line before it, so that a line that was changed or taken out in the
middle shows. Who can write the file can still cut its end off, or write all of it anew: whoever
must trust another's log keeps its last hash.

A line that a crash or a full disk cut off is dropped before the next one; its event was not let
out. Texts are cut to a stated length, so that nobody else decides how long a log is.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchard.communication.readable import readable

AUDIT_FILE = "audit.jsonl"
MAX_TEXT = 1000
"""Longest text of an event, in characters."""
_START = "0" * 64


def content_digest(content: bytes) -> str:
    """Return the SHA-256 of what was sent, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@dataclass
class AuditLog:
    """The log of one party.

    Attributes:
        path: Its file, one JSON object a line; it need not exist yet.
    """

    path: Path

    def __post_init__(self) -> None:
        """Continue after the last complete line."""
        self._last = _START
        self._size = 0
        for line, own_size in _complete_lines(self.path):
            self._last = _digest(line)
            self._size += own_size

    def write(self, event: str, **facts: Any) -> None:
        """Add one event, and return when it is on disk.

        Args:
            event: What happened: ``asked``, ``sent``, ``received``, ``refused``, ``loaded``.
            facts: JSON values: round, site, names, bytes, hash, reason.
        """
        bounded = {key: _bounded(value) for key, value in facts.items()}
        entry = {"time": time.time(), "event": event, **bounded, "previous": self._last}
        line = json.dumps(entry, allow_nan=False).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            # What a full disk let through of an earlier line is no line.
            file.truncate(self._size)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._last = _digest(line)
        self._size += len(line) + 1


def _bounded(value: Any) -> Any:
    """Return a fact whose texts, those of a list too, are of a bounded length."""
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else readable(value, limit=MAX_TEXT)
    return [_bounded(part) for part in value] if isinstance(value, list | tuple) else value


def read_audit(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log, oldest first.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line was changed, added or taken out after it was written.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"audit log must exist, got {path}, which is not there; name the folder of a "
            "coordinated run or of a site"
        )
    events: list[dict[str, Any]] = []
    last = _START
    for number, (line, _) in enumerate(_complete_lines(path), start=1):
        try:
            event = json.loads(line)
            previous = event.pop("previous")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"line {number} of {path} must be an event, got something else; the log was "
                "changed after it was written"
            ) from error
        if previous != last:
            raise ValueError(
                f"line {number} of {path} must follow the line before it, got another hash; the "
                "log was changed after it was written"
            )
        last = _digest(line)
        events.append(event)
    return events


def audit_lines(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one readable line for each event."""
    lines = []
    for event in events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"]))
        facts = " ".join(
            f"{key}={_short(value)}" for key, value in event.items() if key not in ("time", "event")
        )
        lines.append(f"{when}Z {event['event']:<9} {facts}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(readable(str(part)) for part in value[:3]) + (
            ", ..." if len(value) > 3 else ""
        )
        return f"{len(value)} ({shown})" if value else "0"
    text = readable(str(value), limit=MAX_TEXT)
    return f'"{text}"' if " " in text else text


def _complete_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield every line that ends, and how many bytes it takes."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1], len(line)


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
