"""Whole numbers whose sum is the weighted mean to the stated precision, and cannot overflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchard.secure.fixed_point import FixedPoint
from orchard.secure.sharing import join, split
from orchard.server.aggregation import WeightedMean

SHAPES = {"b": (2, 3), "a": (4,), "empty": (0,)}


@pytest.mark.parametrize("number", [3, 10, 50])
def test_the_mean_is_the_plain_mean_to_the_stated_precision(number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    fixed = FixedPoint(SHAPES, bound=4.0, max_weight=300.0, num_members=number)
    plain, total = WeightedMean(), np.zeros(fixed.length, dtype=np.uint32)
    for member in range(number):
        delta = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        weight = dict.fromkeys(SHAPES, 300.0)
        if member == 0:
            del delta["a"], weight["a"]
        plain.add(delta, weight)
        total += fixed.encode(delta, weight)
    expected, found = plain.mean(), fixed.decode(total)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2 * fixed.precision)


@given(
    number=st.integers(1, 64),
    bound=st.floats(1e-3, 1e3),
    sign=st.sampled_from([-1.0, 1.0]),
    share=st.floats(1e-6, 1.0),
)
def test_the_sum_of_the_largest_values_does_not_overflow(
    number: int, bound: float, sign: float, share: float
) -> None:
    fixed = FixedPoint({"a": (1,)}, bound=bound, max_weight=7.0, num_members=number)
    vector = fixed.encode(
        {"a": torch.tensor([sign * bound], dtype=torch.float64)}, {"a": 7 * share}
    )
    total = (vector.astype(np.uint64) * number % 2**32).astype(np.uint32)
    (mean,) = fixed.decode(total)["a"].tolist()
    assert mean == pytest.approx(sign * bound, rel=1e-6 / share)


def test_names_that_nobody_counts_are_absent() -> None:
    fixed = FixedPoint(SHAPES, bound=1.0, max_weight=1.0, num_members=2)
    delta = {"a": torch.ones(4), "b": torch.full((2, 3), float("nan"))}
    found = fixed.decode(fixed.encode(delta, {"a": 1.0, "b": 0.0}))
    assert found.keys() == {"a"}
    assert len(fixed.encode({}, {})) == fixed.length


@pytest.mark.parametrize(
    ("delta", "weight", "words"),
    [
        ({"c": torch.ones(1)}, {"c": 1.0}, "names that the round agreed on, got c"),
        ({"a": torch.ones(3)}, {"a": 1.0}, r"a must have shape \(4,\), got \(3,\)"),
        ({"a": torch.full((4,), 1.5)}, {"a": 1.0}, "finite and within 1, got 1.5"),
        ({"a": torch.full((4,), float("nan"))}, {"a": 1.0}, "finite and within 1, got nan"),
        ({"a": torch.full((4,), float("inf"))}, {"a": 1.0}, "finite and within 1, got inf"),
        ({"a": torch.ones(4)}, {"a": 2.0}, r"weight of a must be 0 or in .*\.\.1, got 2.0"),
        ({"a": torch.ones(4)}, {"a": -1.0}, "weight of a must be"),
        ({"a": torch.ones(4)}, {"a": 1e-30}, "weight of a must be"),
        ({"a": torch.ones(4)}, {"a": float("nan")}, "weight of a must be"),
    ],
)
def test_what_does_not_fit_is_refused(
    delta: dict[str, torch.Tensor], weight: dict[str, float], words: str
) -> None:
    fixed = FixedPoint(SHAPES, bound=1.0, max_weight=1.0, num_members=2)
    with pytest.raises(ValueError, match=words):
        fixed.encode(delta, weight)


@pytest.mark.parametrize(
    ("bound", "weight", "number"),
    [(0.0, 1.0, 1), (float("inf"), 1.0, 1), (1.0, float("nan"), 1), (1.0, 1.0, 0)],
)
def test_what_has_no_range_is_refused(bound: float, weight: float, number: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        FixedPoint(SHAPES, bound=bound, max_weight=weight, num_members=number)


@given(
    secret=st.binary(min_size=32, max_size=32),
    number=st.integers(1, 12),
    data=st.data(),
)
def test_any_threshold_of_shares_gives_the_secret_back(
    secret: bytes, number: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, number))
    shares = split(secret, range(1, number + 1), threshold)
    kept = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert join({point: shares[point] for point in kept}, threshold) == secret
    if threshold > 1:
        with pytest.raises(ValueError, match="shares must be at least"):
            join({point: shares[point] for point in kept[1:]}, threshold)


def test_shares_below_the_threshold_look_alike_for_all_secrets() -> None:
    # With one share of two, every secret is as likely: the other share decides.
    share = split(bytes(32), [1, 2], 2)[1]
    other = split(b"\xff" * 32, [1, 2], 2)[1]
    assert share != split(bytes(32), [1, 2], 2)[1]
    assert share[:4] != bytes(4) or other[:4] != bytes(4)


@pytest.mark.parametrize(
    ("secret", "points", "threshold"),
    [(b"short", [1], 1), (bytes(32), [1, 1], 1), (bytes(32), [0, 1], 1), (bytes(32), [1], 2)],
)
def test_secrets_that_cannot_be_split_are_refused(
    secret: bytes, points: list[int], threshold: int
) -> None:
    with pytest.raises(ValueError, match="must"):
        split(secret, points, threshold)
