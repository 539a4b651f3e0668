from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from orchard.communication.audit import AuditLog, audit_lines, read_audit


def written(path: Path) -> Path:
    log = AuditLog(path)
    log.write("asked", site="north", round=1, bytes=3)
    log.write("sent", round=1, names=["a", "b", "c", "d"], sha256="x" * 8)
    AuditLog(path).write("refused", reason="not this one")  # another process goes on
    return path


def test_events_come_back_in_order(tmp_path: Path) -> None:
    events = read_audit(written(tmp_path / "audit.jsonl"))
    assert [event["event"] for event in events] == ["asked", "sent", "refused"]
    lines = audit_lines(events)
    assert "names=4 (a, b, c, ...)" in lines[1]
    assert 'reason="not this one"' in lines[2]


@pytest.mark.parametrize("change", ["edit", "drop", "swap", "noise"])
def test_a_changed_log_is_found_out(change: str, tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    lines = path.read_text().splitlines()
    if change == "edit":
        lines[0] = json.dumps({**json.loads(lines[0]), "bytes": 4})
    elif change == "drop":
        del lines[1]
    elif change == "swap":
        lines[0], lines[1] = lines[1], lines[0]
    else:
        lines[1] = "[]"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="changed after it was written"):
        read_audit(path)


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    with path.open("a") as file:
        file.write('{"time": 1, "ev')
    AuditLog(path).write("sent", round=2)
    assert [event["event"] for event in read_audit(path)] == ["asked", "sent", "refused", "sent"]


def test_a_log_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="audit log must exist"):
        read_audit(tmp_path / "audit.jsonl")


def test_a_line_that_a_full_disk_cut_off_forges_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(written(tmp_path / "audit.jsonl"))
    size = log.path.stat().st_size

    def full(descriptor: int) -> None:
        # The kernel took a part of the line, and no more.
        os.truncate(log.path, size + 20)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                log.write("sent", round=2)
    assert [event["event"] for event in read_audit(log.path)] == ["asked", "sent", "refused"]
    log.write("sent", round=3)  # there is room again
    assert [event["event"] for event in read_audit(log.path)] == [
        "asked",
        "sent",
        "refused",
        "sent",
    ]
    assert [event.get("round") for event in read_audit(log.path)] == [1, 1, None, 3]


@pytest.mark.parametrize("text", ["\ud800", "a\x1b[31mred", "two\nlines", "\u202eturned"])
def test_no_text_silences_or_paints_what_is_shown(text: str, tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write("refused", reason=text, names=[text])
    (line,) = audit_lines(read_audit(log.path))
    assert line.isprintable()
    assert line.encode()  # half of a surrogate pair has no bytes


def test_nobody_else_decides_how_long_a_log_is(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write("refused", reason="x" * 20_000_000, names=["y" * 5_000_000])
    assert log.path.stat().st_size < 4000
    read_audit(log.path)
