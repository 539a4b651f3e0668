from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from orchard.process_memory import mappings_released, resident_memory_bytes

SIZE = 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="needs madvise")
def test_what_was_read_of_a_mapped_file_is_given_back_and_what_was_written_stays(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.weights"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with path.open("rb") as file:
        mapped = mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
    before = resident_memory_bytes()
    mapped[5] = 77
    assert sum(mapped[place] for place in range(0, SIZE, 4096)) == 0
    assert resident_memory_bytes() - before > 0.9 * SIZE
    with mappings_released(".weights"):
        pass
    assert resident_memory_bytes() - before < 0.5 * SIZE
    assert mapped[5] == 77
    assert mapped[4096 + 6] == 6
    mapped.close()
