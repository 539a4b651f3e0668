"""What is promised to the bit holds with other instruction sets and numbers of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
PROMISED = [
    "tests/engine/test_simulator.py::test_two_rounds_resumed_to_four_equal_four_in_one_go",
    "tests/deployment/test_coordinator.py::test_sites_end_with_the_simulators_tensors",
    "tests/models/stored/test_alignment.py",
]
HAS_AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.long
@pytest.mark.parametrize(
    ("capability", "num_threads"),
    [
        ("default", 2),
        pytest.param(
            "avx2", 1, marks=pytest.mark.skipif(not HAS_AVX2, reason="needs a CPU with AVX2")
        ),
    ],
)
def test_what_is_promised_to_the_bit_holds(capability: str, num_threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *PROMISED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(num_threads)},
        check=False,
    )
    assert done.returncode == 0, done.stdout
