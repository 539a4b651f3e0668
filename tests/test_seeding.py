"""One seed, and independent draws."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchard.seeding import Seeds


def test_a_draw_depends_on_nothing_drawn_before() -> None:
    seeds = Seeds(3)
    expected = seeds.generator("batches", 7, "a").integers(1 << 60, size=5)
    seeds.generator("batches", 6, "a").integers(1 << 60, size=100)
    seeds.generator("cohort", 7).permutation(50)
    np.testing.assert_array_equal(
        seeds.generator("batches", 7, "a").integers(1 << 60, size=5), expected
    )


def test_every_part_of_the_key_counts() -> None:
    keys: list[tuple[str | int, ...]] = [
        ("batches", 1, "a"),
        ("batches", 1, "b"),
        ("batches", 2, "a"),
        ("dropout", 1, "a"),
        ("batches", 1),
        ("batches", 11),
        ("batches1", 1),
    ]
    numbers = {Seeds(root).integer(*key) for root in (0, 1) for key in keys}
    assert len(numbers) == 2 * len(keys)


@given(root=st.integers(0, 2**63), client=st.text())
def test_an_integer_fits_what_torch_takes_as_a_seed(root: int, client: str) -> None:
    number = Seeds(root).integer("dropout", 1, client)
    assert 0 <= number < 2**63
    assert number == Seeds(root).integer("dropout", 1, client)


def test_generators_of_different_clients_are_uncorrelated() -> None:
    draws = [Seeds(0).generator("batches", 1, f"client {i}").normal(size=4000) for i in range(4)]
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


def test_another_process_draws_the_same() -> None:
    code = "from orchard.seeding import Seeds; print(Seeds(5).integer('cohort', 2, 'é'))"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(printed) == Seeds(5).integer("cohort", 2, "é")
