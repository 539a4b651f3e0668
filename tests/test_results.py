"""Files that survive a crash, and what a run ran on."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
from pathlib import Path

import pytest

from orchard import results
from orchard.process_memory import (
    loading_to_stay,
    peak_memory_bytes,
    release_freed_memory,
    resident_memory_bytes,
)
from orchard.results import MetricsLog, environment, write_atomically, write_json


def test_a_write_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_crash_before_the_rename_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"again")
    assert path.read_bytes() == b"again"


def test_content_is_on_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        order.append("fsync")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(tmp_path / "file", b"content")
    assert order == ["fsync", "replace", "fsync"]


def test_json_holds_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "good.json", {"a": [1, 2.5]})
    assert json.loads((tmp_path / "good.json").read_text()) == {"a": [1, 2.5]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "bad.json", {"a": math.nan})
    assert not (tmp_path / "bad.json").exists()


def test_the_log_reads_back_what_was_appended(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    assert log.read() == []
    lines = [{"round": number, "round/loss": 1 / number} for number in (1, 2, 3)]
    for line in lines:
        log.append(line)
    assert log.read() == lines


def test_the_log_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"round": 1})
    with pytest.raises(ValueError, match="JSON"):
        log.append({"round": 2, "round/loss": math.inf})
    assert log.read() == [{"round": 1}]


def test_a_line_cut_off_by_a_crash_is_left_out_and_rewound(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for number in (1, 2, 3):
        log.append({"round": number})
    with log.path.open("a") as file:
        file.write('{"round": 4, "round/lo')
    assert [line["round"] for line in log.read()] == [1, 2, 3]
    log.rewind(2)
    assert log.read() == [{"round": 1}, {"round": 2}]
    log.append({"round": 3, "again": True})
    assert log.read() == [{"round": 1}, {"round": 2}, {"round": 3, "again": True}]


def test_rewinding_a_log_that_does_not_exist_gives_an_empty_one(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(0)
    assert log.read() == []
    log.append({"round": 1})
    assert log.read() == [{"round": 1}]


def test_the_environment_says_what_a_run_ran_on(tmp_path: Path) -> None:
    found = environment()
    assert {"python", "torch", "transformers", "peft", "numpy"} <= found["versions"].keys()
    assert found["hardware"]["num_cpus"] >= 1
    write_json(tmp_path / "environment.json", found)
    commit = found["commit"]
    assert commit is None or len(commit.removesuffix("+changes")) in (40, 64)


CPU_INFO = """processor	: 0
model name	: Some Processor: 3
flags		: fpu avx512_bf16 avx2 avx512f amx_bf16_not
processor	: 1
model name	: Another
flags		: fpu
"""


@pytest.mark.parametrize(
    ("info", "features"),
    [
        (CPU_INFO, ["avx2", "avx512f", "avx512_bf16"]),
        ("processor : 0\nFeatures : fp asimd bf16 aes\n", ["asimd", "bf16"]),
        ("processor : 0\n", None),
        (None, None),
    ],
)
def test_the_environment_has_the_instruction_sets_that_matter(
    info: str | None, features: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    if info is not None:
        path.write_text(info)
    monkeypatch.setattr(results, "_CPU_INFO", path)
    hardware = environment()["hardware"]
    assert hardware["cpu_features"] == features
    expected = "Some Processor: 3" if info == CPU_INFO else platform.processor()
    assert hardware["cpu"] == expected


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_memory_bytes()
    block = bytearray(32 << 20)
    after = peak_memory_bytes()
    assert len(block) < before <= after < 1 << 40


def test_freed_memory_can_be_given_back() -> None:
    blocks = [bytearray(64 << 10) for _ in range(200)]
    del blocks[::2]
    release_freed_memory()
    assert sum(len(block) for block in blocks) == 100 * (64 << 10)


def test_what_is_loaded_to_stay_is_passed_over_by_the_collector() -> None:
    before = gc.get_freeze_count()
    try:
        with loading_to_stay():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_the_collector_is_on_again_after_an_error() -> None:
    before = gc.get_freeze_count()  # commands that ran in this process have set something aside
    with pytest.raises(KeyError), loading_to_stay():
        raise KeyError
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_resident_memory_is_what_is_held_now() -> None:
    before = resident_memory_bytes()
    held = bytearray(b"1") * 64_000_000
    assert resident_memory_bytes() - before > 60_000_000
    del held
    assert resident_memory_bytes() <= peak_memory_bytes()


def test_a_log_is_read_one_line_at_a_time_without_one_that_was_cut_off(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert list(log) == []
    log.path.write_text('{"round": 1}\n\n{"round": 2}\nno JSON, and never read\n{"rou')
    lines = iter(log)
    assert [next(lines), next(lines)] == [{"round": 1}, {"round": 2}]
    log.path.write_text('{"round": 1}\n{"round": 2}\n{"rou')
    assert list(log) == [{"round": 1}, {"round": 2}]
