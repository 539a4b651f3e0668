"""One process at a time in a folder."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from orchard.engine.processes import InUseError, only_one


def test_another_one_is_waited_for_and_no_longer_than_asked(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "own.lock"
    is_held = threading.Event()

    def hold() -> None:
        with only_one(path, seconds=0.0, what="holder"):
            is_held.set()
            time.sleep(0.5)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(10)
    with (
        pytest.raises(
            InUseError,
            match=rf"^only one writer may run, got process {os.getpid()} of .*, which holds",
        ),
        only_one(path, seconds=0.0, what="writer"),
    ):
        pass
    started = time.monotonic()
    with only_one(path, seconds=30.0, what="writer"):
        assert time.monotonic() - started > 0.1
    holder.join()
