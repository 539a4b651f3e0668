from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.data.datasets import Example
from orchard.data.partition import (
    Partition,
    by_category,
    dirichlet,
    dirichlet_resample,
    find_duplicates,
    iid,
    split_pool,
    split_test,
    without_duplicates,
)


def label_counts(clients: Partition, labels: Sequence[str]) -> dict[str, Counter[str]]:
    return {
        client: Counter(labels[index] for index in indices) for client, indices in clients.items()
    }


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_disjoint_and_complete(clients: Partition, num_examples: int) -> None:
    held = [index for indices in clients.values() for index in indices]
    assert sorted(held) == list(range(num_examples))
    assert all(indices == sorted(indices) for indices in clients.values())


LABELS = ["a"] * 300 + ["b"] * 500 + ["c"] * 200
seeds = st.integers(0, 2**32 - 1)


# iid


@settings(deadline=None)
@given(st.integers(1, 200), st.data(), seeds)
def test_iid_is_disjoint_complete_and_even(
    num_examples: int, data: st.DataObject, seed: int
) -> None:
    num_clients = data.draw(st.integers(1, num_examples))
    clients = iid(num_examples, num_clients, generator(seed))
    assert len(clients) == num_clients
    assert_disjoint_and_complete(clients, num_examples)
    sizes = [len(indices) for indices in clients.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_iid_mixes_labels() -> None:
    clients = iid(len(LABELS), 5, generator())
    for counts in label_counts(clients, LABELS).values():
        # 5 standard deviations of a hypergeometric count are 29 and 32.
        assert abs(counts["a"] - 60) < 29
        assert abs(counts["b"] - 100) < 32


def test_ids_sort_in_the_order_of_clients() -> None:
    assert list(iid(3, 3, generator())) == ["client_00", "client_01", "client_02"]
    many = list(iid(120, 120, generator()))
    assert many == sorted(many)
    assert many[0] == "client_000"


# dirichlet


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), min_size=20, max_size=300),
    st.integers(1, 4),
    st.floats(0.5, 1e6),
    seeds,
)
def test_dirichlet_is_disjoint_and_complete(
    labels: list[str], num_clients: int, alpha: float, seed: int
) -> None:
    clients = dirichlet(labels, num_clients, alpha, generator(seed))
    assert len(clients) == num_clients
    assert_disjoint_and_complete(clients, len(labels))
    assert all(clients.values())


@pytest.mark.parametrize("min_examples", [0, 1, 60])
def test_dirichlet_gives_every_client_its_minimum(min_examples: int) -> None:
    for seed in range(20):
        clients = dirichlet(LABELS, 10, 1.0, generator(seed), min_examples=min_examples)
        assert min(map(len, clients.values())) >= min_examples


def test_dirichlet_without_a_minimum_may_leave_clients_empty() -> None:
    clients = dirichlet(LABELS, 10, 0.01, generator(), min_examples=0)
    assert_disjoint_and_complete(clients, len(LABELS))
    assert not all(clients.values())


def test_dirichlet_with_a_large_alpha_is_even() -> None:
    for counts in label_counts(dirichlet(LABELS, 5, 1e7, generator()), LABELS).values():
        assert counts == pytest.approx({"a": 60, "b": 100, "c": 40}, abs=2)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_dirichlet_shares_have_the_variance_asked_for(alpha: float) -> None:
    num_clients, draws = 4, 400
    shares = []
    for seed in range(draws):
        clients = dirichlet(LABELS, num_clients, alpha, generator(seed), min_examples=0)
        shares.append([counts["b"] / 500 for counts in label_counts(clients, LABELS).values()])
    # Each share is Beta(alpha, (C - 1) alpha): mean 1 / C, variance (C - 1) / (C^2 (C alpha + 1)).
    variance = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    assert np.mean(shares, axis=0) == pytest.approx(1 / num_clients, abs=0.08)
    assert np.var(shares) == pytest.approx(variance, rel=0.15)


# dirichlet_resample


def test_resampling_draws_with_replacement_and_lets_clients_overlap() -> None:
    clients = dirichlet_resample(LABELS, 10, 1.0, 1000, generator())
    assert all(len(indices) == 1000 for indices in clients.values())
    assert all(set(indices) <= set(range(len(LABELS))) for indices in clients.values())
    assert all(len(set(indices)) < 1000 for indices in clients.values())
    assert set(clients["client_00"]) & set(clients["client_01"])


def test_resampling_weighs_the_size_of_a_category() -> None:
    # With shares that are all but equal, a label is drawn as often as it stands in the pool.
    clients = dirichlet_resample(LABELS, 1, 1e7, 20_000, generator())
    counts = label_counts(clients, LABELS)["client_00"]
    assert counts == pytest.approx({"a": 6000, "b": 10_000, "c": 4000}, rel=0.05)


def test_resampling_with_a_small_alpha_gives_mostly_one_category() -> None:
    clients = dirichlet_resample(LABELS, 50, 0.01, 100, generator())
    largest = [max(counts.values()) for counts in label_counts(clients, LABELS).values()]
    assert np.mean(largest) > 95


# by_category


def test_each_category_goes_to_one_client_in_the_order_given() -> None:
    assert by_category(["x", "y", "z", "x"], ["z", "x"]) == {"z": [2], "x": [0, 3]}
    assert list(by_category(LABELS, ["c", "a"])) == ["c", "a"]


def test_an_unknown_category_names_the_existing_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"among 'closed_qa', 'open_qa', got 'closedqa'.*'closed_qa'"
    ):
        by_category(["open_qa", "closed_qa"], ["closedqa"])


def test_a_category_cannot_be_given_twice() -> None:
    with pytest.raises(ValueError, match="categories must differ, got 'a' 2 times"):
        by_category(LABELS, ["a", "b", "a"])


def test_at_least_one_category_must_be_given() -> None:
    with pytest.raises(ValueError, match="categories must name at least one category"):
        by_category(LABELS, [])


def test_no_category_exists_in_an_empty_pool() -> None:
    with pytest.raises(ValueError, match="got 'a'; the data set is empty"):
        by_category([], ["a"])


# What all have in common


DRAWS: dict[str, Callable[[np.random.Generator], object]] = {
    "iid": lambda g: iid(len(LABELS), 7, g),
    "dirichlet": lambda g: dirichlet(LABELS, 7, 0.5, g),
    "dirichlet_resample": lambda g: dirichlet_resample(LABELS, 7, 0.5, 50, g),
    "split_test": lambda g: split_test(range(100), 0.2, g),
    "split_pool": lambda g: split_pool(LABELS, 25, g),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_a_draw_depends_on_the_generator_only(
    draw: Callable[[np.random.Generator], object],
) -> None:
    assert draw(generator(1)) == draw(generator(1))
    assert draw(generator(1)) != draw(generator(2))


@pytest.mark.parametrize("num_clients", [0, -1, 1001])
def test_num_clients_must_be_in_range(num_clients: int) -> None:
    message = f"num_clients must be in 1..1000 .*, got {num_clients}; lower num_clients"
    with pytest.raises(ValueError, match=message):
        iid(len(LABELS), num_clients, generator())
    with pytest.raises(ValueError, match=message):
        dirichlet(LABELS, num_clients, 1.0, generator())
    with pytest.raises(ValueError, match=message):
        dirichlet_resample(LABELS, num_clients, 1.0, 10, generator())


def test_an_empty_pool_cannot_be_partitioned() -> None:
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        iid(0, 1, generator())


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive_and_finite(alpha: float) -> None:
    message = f"alpha must be a finite number > 0, got {alpha}"
    with pytest.raises(ValueError, match=message):
        dirichlet(LABELS, 2, alpha, generator())
    with pytest.raises(ValueError, match=message):
        dirichlet_resample(LABELS, 2, alpha, 10, generator())


@pytest.mark.parametrize("min_examples", [-1, 101])
def test_min_examples_must_be_within_reach(min_examples: int) -> None:
    with pytest.raises(ValueError, match=rf"min_examples must be in 0\.\.100 .*got {min_examples}"):
        dirichlet(LABELS, 10, 1.0, generator(), min_examples=min_examples)


def test_an_alpha_that_starves_clients_is_an_error_after_bounded_draws() -> None:
    with pytest.raises(ValueError, match=r"alpha must let each of 100 clients hold 1 .*got 0.001"):
        dirichlet(LABELS, 100, 0.001, generator())


def test_examples_per_client_must_be_positive() -> None:
    with pytest.raises(ValueError, match="examples_per_client must be at least 1, got 0"):
        dirichlet_resample(LABELS, 2, 1.0, 0, generator())


# Test splits


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2), st.floats(0.5, 0.6), seeds)
def test_a_test_split_shares_nothing_with_training(
    indices: list[int], share: float, seed: int
) -> None:
    distinct = set(indices)
    if len(distinct) < 3:
        indices = [*indices, 51, 52, 53]
        distinct = set(indices)
    train, test = split_test(indices, share, generator(seed))
    assert set(train).isdisjoint(test)
    assert set(train) | set(test) == distinct
    assert len(test) == round(share * len(distinct))
    assert test == sorted(set(test))
    assert train == [index for index in indices if index not in test]


def test_a_test_size_is_a_number_of_examples_or_a_share() -> None:
    indices = list(range(100, 140))
    assert [len(part) for part in split_test(indices, 10, generator())] == [30, 10]
    assert [len(part) for part in split_test(indices, 0.25, generator())] == [30, 10]
    assert split_test(indices, 0, generator()) == (indices, [])
    assert split_test(indices, 0.0, generator()) == (indices, [])


WRONG_TEST_SIZES = {
    "all": (10, "must leave client 'a' at least one of 10 examples to train on, got 10"),
    "most": (0.99, "must leave client 'a' at least one of 10 examples to train on, got 0.99"),
    "too few": (0.01, "must give client 'a' at least one of 10 examples to test on, got 0.01"),
    "negative": (-1, "must be at least 0, got -1"),
    "share of one": (1.0, r"must be a share in \[0, 1\) or a whole number, got 1.0"),
    "not a number": (float("nan"), r"must be a share in \[0, 1\)"),
}


@pytest.mark.parametrize(
    ("test_size", "message"), WRONG_TEST_SIZES.values(), ids=WRONG_TEST_SIZES.keys()
)
def test_a_test_size_must_leave_both_sides_something(test_size: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"test_size {message}"):
        split_test(range(10), test_size, generator(), client_id="a")


def test_a_central_test_split_takes_the_same_from_each_category() -> None:
    pool, test = split_pool(LABELS, 25, generator())
    assert Counter(LABELS[index] for index in test) == {"a": 25, "b": 25, "c": 25}
    assert sorted(pool + test) == list(range(len(LABELS)))
    assert pool == sorted(pool)
    assert test == sorted(test)


def test_a_central_test_split_must_not_use_up_a_category() -> None:
    with pytest.raises(ValueError, match="less than the 200 examples of category 'c', got 200"):
        split_pool(LABELS, 200, generator())


def test_a_central_test_split_must_not_be_empty() -> None:
    with pytest.raises(ValueError, match="per_category must be at least 1, got 0"):
        split_pool(LABELS, 0, generator())


# Duplicates


A, B, C, D = (Example(f"ask {name}", name) for name in "ABCD")
A_AGAIN = Example("ASK  a", "a ", category="other")


def test_duplicates_are_counted_across_splits_and_clients() -> None:
    report = find_duplicates({"x": [A, A, B], "y": [A_AGAIN, C]}, {"x": [A_AGAIN, D], "y": [C, B]})
    assert report.num_across_splits == 3
    assert report.num_across_clients == 1
    assert report.examples == (A_AGAIN, C, B)


def test_repeats_within_one_client_are_no_duplicates_across_clients() -> None:
    report = find_duplicates({"x": [A, A_AGAIN], "y": [B]}, {"central": [C]})
    assert (report.num_across_splits, report.num_across_clients, report.examples) == (0, 0, ())


def test_what_stands_in_any_test_split_leaves_every_training_split() -> None:
    train = {"x": [A, B, A_AGAIN], "y": [A, C]}
    kept, num_removed = without_duplicates(train, {"y": [A]})
    assert kept == {"x": [B], "y": [C]}
    assert num_removed == 3
    assert train == {"x": [A, B, A_AGAIN], "y": [A, C]}
    assert find_duplicates(kept, {"y": [A]}).num_across_splits == 0


def test_removing_duplicates_must_leave_a_client_something() -> None:
    with pytest.raises(ValueError, match="client 'y' must keep at least one training example"):
        without_duplicates({"x": [B], "y": [A]}, {"x": [A_AGAIN]})
