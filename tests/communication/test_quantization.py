"""int8 in blocks: within its stated error, as long as stated, and strict in what it reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.communication.quantization import Int8
from orchard.communication.stages import payload_bytes

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Values of one size together too: among all of float32's, one is most of a block.
ALIKE = st.tuples(st.integers(-140, 127), st.lists(st.floats(-1, 1, width=32), max_size=40)).map(
    lambda drawn: [value * 2.0 ** drawn[0] for value in drawn[1]]
)


def assert_within_bound(sent: torch.Tensor, received: torch.Tensor, block: int) -> None:
    """Check the docstring of ``Int8``, in float64."""
    assert received.dtype == torch.float32
    assert received.shape == sent.shape
    assert bool(received.isfinite().all())
    for own, found in zip(
        sent.double().reshape(-1).split(block),
        received.double().reshape(-1).split(block),
        strict=True,
    ):
        if own.numel():
            bound = max(float(own.abs().max()) / 254 * (1 + 2**-8), 2.0**-119)
            assert float((found - own).abs().max()) <= bound


@settings(deadline=None)
@given(values=st.one_of(st.lists(FINITE, max_size=40), ALIKE), block=st.sampled_from((1, 8, 128)))
def test_every_value_is_within_its_blocks_stated_error(values: list[float], block: int) -> None:
    sent, stage = torch.tensor(values), Int8(block)
    assert_within_bound(sent, stage.decode(stage.encode({"a": sent}))["a"], block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(), (0,), (4, 0), (1,), (127,), (128,), (129,), (3, 100), (513,)]
)
def test_shapes_and_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_within_bound(sent, Int8().decode(Int8().encode({"a": sent}))["a"], 128)


@pytest.mark.parametrize("size", [0.0, -0.0, 1e-45, 1e-40, 1e-38, 2e-36, 1.0, 1e30, 3.4028234e38])
def test_blocks_of_any_size_beside_each_other(size: float) -> None:
    pattern = torch.linspace(-1, 1, 128)
    sent = torch.cat([pattern * size, pattern, torch.zeros(128), torch.full((128,), size)])
    received = Int8().decode(Int8().encode({"a": sent}))["a"]
    assert_within_bound(sent, received, 128)
    assert not received[256:384].any()


def test_the_error_bound_is_nearly_reached() -> None:
    sent = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    received = Int8().decode(Int8().encode({"a": sent}))["a"]
    largest = sent.split(128)
    worst = max(
        float(((r - s).abs() / s.abs().max()).max())
        for s, r in zip(largest, received.split(128), strict=True)
    )
    assert worst > 0.98 / 254


def test_a_worked_example() -> None:
    encoded = Int8(block=4).encode({"a": torch.tensor([127.0, 1.0, 0.4, -0.6, -254.0])})
    assert encoded["a"].tolist() == [127, 1, 0, -1, -127]
    assert encoded["#scales"].tolist() == [1.0, 2.0]
    assert Int8(block=4).decode(encoded)["a"].tolist() == [127.0, 1.0, 0.0, -1.0, -254.0]


@given(st.integers(0, 2000))
def test_the_payload_is_as_long_as_predicted(num_values: int) -> None:
    encoded = Int8().encode({"a": torch.ones(num_values)})
    assert payload_bytes((Int8(),), num_values) == sum(t.nbytes for t in encoded.values())


def test_tensors_of_int8_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a must not be int8"):
        Int8().encode({"a": torch.ones(2, dtype=torch.int8)})


def scaled(*scales: float) -> torch.Tensor:
    return torch.tensor(scales, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (None, "must have 2 bfloat16 scales for its int8 values, got 0 of"),
        (scaled(1.0), "must have 2 bfloat16 scales for its int8 values, got 1 of"),
        (scaled(1.0, 1.0, 1.0), "must have 2 bfloat16 scales .* got 3 of"),
        (scaled(1.0, 1.0)[:, None], "must have 2 bfloat16 scales"),
        (torch.ones(2), "must have 2 bfloat16 scales .* of torch.float32"),
        (scaled(1.0, float("nan")), "scales of int8 values must be finite"),
        (scaled(1.0, float("inf")), "scales of int8 values must be finite"),
        (scaled(1.0, -1.0), "scales of int8 values must be finite and at least 0"),
    ],
)
def test_wrong_scales_are_refused(scales: torch.Tensor | None, message: str) -> None:
    tree = {"a": torch.ones(129, dtype=torch.int8)}
    if scales is not None:
        tree["#scales"] = scales
    with pytest.raises(ValueError, match=message):
        Int8().decode(tree)


def test_values_that_are_not_int8_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a must arrive as int8, got torch\.float32; "):
        Int8().decode({"a": torch.ones(3)})


def test_levels_below_the_last_decode_all_the_same() -> None:
    tree = {"a": torch.tensor([-128], dtype=torch.int8), "#scales": scaled(3.3e38)}
    assert bool(Int8().decode(tree)["a"].isfinite().all())
