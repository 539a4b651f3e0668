"""Arithmetic on named tensors, and their digest."""

from __future__ import annotations

import math

import pytest
import torch

from orchard import trees


def tree(**values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_subtract_keeps_the_order_of_the_left_and_is_float32() -> None:
    left = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.ones(2, dtype=torch.bfloat16)}
    difference = trees.subtract(left, tree(a=[1.0, 2.0], b=[0.5, 0.0], c=[9.0]))
    assert list(difference) == ["b", "a"]
    assert all(tensor.dtype == torch.float32 for tensor in difference.values())
    assert difference["b"].tolist() == [0.5, 1.0]


def test_subtract_of_a_missing_name_is_an_error() -> None:
    with pytest.raises(KeyError):
        trees.subtract(tree(a=[1.0]), tree(b=[1.0]))


def test_clone_has_its_own_memory_and_no_graph() -> None:
    source = {"a": torch.ones(2, requires_grad=True) * 2}
    copy = trees.clone(source)
    assert not copy["a"].requires_grad
    assert copy["a"].data_ptr() != source["a"].data_ptr()


def test_select_returns_names_in_the_order_asked_for() -> None:
    assert list(trees.select(tree(a=[1.0], b=[2.0], c=[3.0]), ["c", "a"])) == ["c", "a"]
    with pytest.raises(KeyError):
        trees.select(tree(a=[1.0]), ["b"])


def test_squared_norm_is_a_sum_over_all_values_without_overflow() -> None:
    assert trees.squared_norm(tree(a=[3.0], b=[4.0])) == 25.0
    assert trees.squared_norm({}) == 0.0
    large = {"a": torch.tensor([3e4, 4e4], dtype=torch.float16)}
    assert math.sqrt(trees.squared_norm(large)) == pytest.approx(5e4, rel=1e-3)


MINE = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1])}
OTHERS = {
    "fewer names": {"a": MINE["a"]},
    "another name": {"a": MINE["a"], "c": MINE["b"]},
    "shape": {"a": MINE["a"][None], "b": MINE["b"]},
    "dtype": {"a": MINE["a"].double(), "b": MINE["b"]},
    "value": {"a": torch.tensor([1.0, 1e-30]), "b": MINE["b"]},
    "sign of zero": {"a": torch.tensor([1.0, -0.0]), "b": MINE["b"]},
}


@pytest.mark.parametrize("difference", OTHERS)
def test_trees_with_any_difference_are_not_equal(difference: str) -> None:
    assert not trees.equal(MINE, OTHERS[difference])
    assert not trees.equal(OTHERS[difference], MINE)
    assert trees.digest(MINE) != trees.digest(OTHERS[difference])


def test_equal_compares_bits_and_no_order() -> None:
    assert trees.equal(MINE, {"b": MINE["b"].clone(), "a": MINE["a"].clone()})
    assert trees.equal(tree(a=[math.nan]), tree(a=[math.nan]))


def test_digest_does_not_depend_on_order_strides_or_graph() -> None:
    values = torch.arange(6.0).view(2, 3)
    plain = {"a": values, "b": torch.tensor(1.0)}
    other = {"b": torch.tensor(1.0, requires_grad=True), "a": values.t().contiguous().t()}
    assert not other["a"].is_contiguous()
    assert trees.digest(plain) == trees.digest(other)


def test_digest_depends_on_name_dtype_shape_and_bits() -> None:
    digests = {
        trees.digest(some)
        for some in (
            {},
            {"a": torch.zeros(4)},
            {"b": torch.zeros(4)},
            {"a": torch.zeros(2, 2)},
            {"a": torch.zeros(4, dtype=torch.int32)},
            {"a": -torch.zeros(4)},
            {"a": torch.zeros(0)},
            {"a": torch.zeros(())},
            {"a": torch.zeros(8, dtype=torch.bfloat16)},
        )
    }
    assert len(digests) == 9
    assert all(len(text) == 64 for text in digests)
