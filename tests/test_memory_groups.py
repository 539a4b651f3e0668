"""What of the machine a process may have: the least of it and the control groups around it."""

from pathlib import Path

import pytest

from orchard import process_memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in place of the system's: 8 MiB, of which 6 are available."""
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 8192 kB\nMemAvailable: 6144 kB\n")
    monkeypatch.setattr(process_memory, "_MEMINFO", info)
    monkeypatch.setattr(process_memory, "_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(process_memory, "_OWN_GROUPS", tmp_path / "own")
    return tmp_path


def _write(folder: Path, **values: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(value)


def test_without_groups_it_is_the_machines(machine: Path) -> None:
    """What the system says of the machine, where there is nothing else."""
    assert process_memory.machine_memory_bytes() == 8192 * 1024
    assert process_memory.available_memory_bytes() == 6144 * 1024


def test_a_container_sees_its_limit_at_the_root(machine: Path) -> None:
    """The path that the system names need not be there; pages of files can be taken back."""
    (machine / "own").write_text("0::/on/the/host\n")
    stat = "anon 700\ninactive_file 200\nactive_file 100\n"
    _write(machine / "cgroup", memory__max="5000", memory__current="1000", memory__stat=stat)
    assert process_memory.machine_memory_bytes() == 5000
    assert process_memory.available_memory_bytes() == 5000 - (1000 - 300)


def test_a_group_and_those_around_it_count(machine: Path) -> None:
    """The one with the least decides, and ``max`` is no limit."""
    (machine / "own").write_text("0::/outer/inner\n")
    outer = machine / "cgroup" / "outer"
    _write(outer, memory__max="5000", memory__current="4000")
    _write(outer / "inner", memory__max="max", memory__current="100")
    assert process_memory.machine_memory_bytes() == 5000
    assert process_memory.available_memory_bytes() == 1000


def test_the_first_version_of_groups_is_read_too(machine: Path) -> None:
    """Its hierarchy of memory has a folder and a line of its own, and sums named total."""
    (machine / "own").write_text("5:devices:/\n4:memory:/mine\n0::/\n")
    mine = machine / "cgroup" / "memory" / "mine"
    stat = "inactive_file 1\ntotal_inactive_file 500\ntotal_active_file 0\n"
    _write(mine, memory__limit_in_bytes="3000", memory__usage_in_bytes="2000", memory__stat=stat)
    _write(mine.parent, memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1")
    assert process_memory.machine_memory_bytes() == 3000
    assert process_memory.available_memory_bytes() == 1500
