"""Top-k: the largest arrive, the rest is within its bound, and what is read is checked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.communication.quantization import Int8
from orchard.communication.sparsification import TopK
from orchard.communication.stages import Cast, payload_bytes
from orchard.trees import equal

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
SHARES = st.sampled_from((0.001, 0.01, 0.1, 1 / 3, 0.5, 1.0))


@settings(deadline=None)
@given(values=st.lists(FINITE, max_size=60), share=SHARES)
def test_what_is_sent_is_exact_and_the_rest_within_its_stated_error(
    values: list[float], share: float
) -> None:
    sent, stage = torch.tensor(values), TopK(share)
    received = stage.decode(stage.encode({"a": sent}))["a"]
    assert received.shape == sent.shape
    is_sent = received != 0
    assert torch.equal(received[is_sent], sent[is_sent])
    assert int(is_sent.sum()) <= stage.count(len(values))
    lost = sent[~is_sent].double()
    if bool(is_sent.any()) and lost.numel():
        assert float(lost.abs().max()) <= float(sent[is_sent].double().abs().min())
    norm = float(sent.double().square().sum())
    assert float(lost.square().sum()) <= (1 - share) * norm * (1 + 1e-9) + 1e-8 * norm


@given(st.integers(1, 10_000), SHARES)
def test_the_count_is_the_share_rounded_up(num_values: int, share: float) -> None:
    count = TopK(share).count(num_values)
    assert 1 <= count <= num_values
    assert share * num_values - 1e-4 <= count < share * num_values + 1


def test_counts_of_products_that_are_not_exact() -> None:
    assert [TopK(0.1).count(n) for n in (0, 1, 10, 30, 31, 1000)] == [0, 1, 1, 3, 4, 100]


def test_of_equal_values_the_first_are_sent() -> None:
    sent = torch.tensor([1.0, -2.0, 1.0, -1.0, 1.0, 0.0])
    received = TopK(0.5).decode(TopK(0.5).encode({"a": sent}))["a"]
    assert received.tolist() == [1.0, -2.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "inner", [None, Cast(torch.bfloat16), Int8()], ids=["none", "bf16", "int8"]
)
@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (1,), (300,), (70, 11), (5, 6, 7), (300, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_inner_stages(
    dtype: torch.dtype, shape: tuple[int, ...], inner: Int8 | Cast | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    sent = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("b", "a")}
    stages = (TopK(0.1),) if inner is None else (TopK(0.1), inner)
    encoded = sent
    for stage in stages:
        encoded = stage.encode(encoded)
    received = encoded
    for stage in reversed(stages):
        received = stage.decode(received)
    for name, value in sent.items():
        assert received[name].shape == value.shape
        assert received[name].dtype == torch.float32
        kept = received[name] != 0
        assert int(kept.sum()) <= TopK(0.1).count(value.numel())
        torch.testing.assert_close(
            received[name][kept], value[kept].float(), rtol=2**-8, atol=0.02 if inner else 0
        )


@settings(deadline=None)
@given(num_values=st.integers(0, 70_000), share=SHARES)
def test_the_payload_is_as_long_as_predicted(num_values: int, share: float) -> None:
    stages = (TopK(share), Cast(torch.bfloat16))
    sent = torch.randn(num_values, 1, generator=torch.Generator().manual_seed(0))
    encoded = stages[1].encode(stages[0].encode({"a": sent}))
    assert payload_bytes(stages, num_values) == sum(t.nbytes for t in encoded.values())


@pytest.mark.parametrize(
    ("share", "num_values", "position_bytes"),
    [
        (0.5, 80, 10),  # a bit for each
        (0.01, 200, 2),  # a byte for each that is sent
        (0.01, 1000, 2 * 10),
        (0.001, 100_000, 4 * 100),
    ],
)
def test_positions_take_the_shortest_form(
    share: float, num_values: int, position_bytes: int
) -> None:
    sent = torch.randn(num_values, generator=torch.Generator().manual_seed(0))
    stage = TopK(share)
    encoded = stage.encode({"a": sent})
    assert encoded["#positions"].nbytes == position_bytes
    received = stage.decode(encoded)["a"]
    threshold = sent.abs().sort().values[-stage.count(num_values)]
    assert torch.equal(received, torch.where(sent.abs() >= threshold, sent, torch.zeros(())))


def encoded() -> dict[str, torch.Tensor]:
    sent = torch.randn(600, 1, generator=torch.Generator().manual_seed(0))
    return dict(TopK(0.01).encode({"a": sent}))


WRONG = {
    "no shapes": lambda t: t.pop("#shapes"),
    "another shape": lambda t: t.update({"#shapes": torch.tensor([2, 700, 1])}),
    "a huge shape": lambda t: t.update({"#shapes": torch.tensor([2, 2**40, 2**20])}),
    "a huge number of dimensions": lambda t: t.update({"#shapes": torch.tensor([2**50, 600])}),
    "a negative size": lambda t: t.update({"#shapes": torch.tensor([2, -600, -1])}),
    "shapes cut off": lambda t: t.update({"#shapes": torch.tensor([2, 600])}),
    "shapes of floats": lambda t: t.update({"#shapes": torch.tensor([2.0, 600.0, 1.0])}),
    "one shape too many": lambda t: t.update({"#shapes": torch.tensor([2, 600, 1, 0])}),
    "values in a table": lambda t: t.update({"a": t["a"][:, None]}),
    "a value too few": lambda t: t.update({"a": t["a"][1:]}),
    "no positions": lambda t: t.pop("#positions"),
    "positions cut off": lambda t: t.update({"#positions": t["#positions"][:-1]}),
    "positions too many": lambda t: t.update({"#positions": t["#positions"].repeat(2)}),
    "positions of floats": lambda t: t.update({"#positions": t["#positions"].float()}),
    "position out of range": lambda t: t["#positions"].__setitem__(slice(-2, None), 255),
    "positions in disorder": lambda t: t.update({"#positions": t["#positions"].flip(0)}),
    "one position twice": lambda t: t["#positions"].__setitem__(slice(2, 4), t["#positions"][:2]),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_does_not_belong_together_is_refused(change: object) -> None:
    tree = encoded()
    TopK(0.01).decode(tree)
    change(tree)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r" must .*; check that both sides run the same recipe"):
        TopK(0.01).decode(tree)


def test_a_bit_too_many_or_beyond_the_end_is_refused() -> None:
    tree = dict(TopK(0.5).encode({"a": torch.arange(1.0, 10.0)}))
    assert tree["#positions"].numel() == 2
    for bits in (torch.tensor([255, 1]), torch.tensor([15, 0]), torch.tensor([15, 2])):
        with pytest.raises(ValueError, match="positions of a must be 5 ascending numbers below 9"):
            TopK(0.5).decode({**tree, "#positions": bits.to(torch.uint8)})


def test_another_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a must have 60 of the values of its shape \(600, 1\)"):
        TopK(0.1).decode(encoded())


def test_the_share_of_all_is_the_identity() -> None:
    tree = {"a": torch.randn(3, 4), "n": torch.tensor([3])}
    assert equal(TopK(1.0).decode(TopK(1.0).encode(tree)), tree)
    assert math.ceil(1.0 * 12) == TopK(1.0).count(12)
