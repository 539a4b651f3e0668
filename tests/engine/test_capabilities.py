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


@pytest.mark.parametrize(
    "capability",
    [
        pytest.param("default", marks=pytest.mark.long),
        pytest.param(
            "avx2",
            marks=[
                pytest.mark.exhaustive,
                pytest.mark.skipif(not HAS_AVX2, reason="needs a CPU with AVX2"),
            ],
        ),
    ],
)
def test_what_is_promised_to_the_bit_holds(capability: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *PROMISED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout
