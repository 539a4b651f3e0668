"""Amounts that differ between clients, as the text of one option."""

from __future__ import annotations

import re
from collections.abc import Callable, Sized
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchard.recipe.amounts import ExpertAmount, parse_amounts


def sizes(text: str, num_clients: int = 3, seed: int = 0) -> tuple[int, ...]:
    generator = np.random.default_rng(seed)
    return parse_amounts(
        text, name="client.memory", num_clients=num_clients, generator=generator, kind="bytes"
    )


def experts(text: str, num_clients: int = 3, seed: int = 0) -> tuple[ExpertAmount, ...]:
    generator = np.random.default_rng(seed)
    return parse_amounts(
        text, name="client.budget", num_clients=num_clients, generator=generator, kind="experts"
    )


def counts(text: str, num_experts: int, num_clients: int = 3, seed: int = 0) -> list[int]:
    amounts = experts(text, num_clients, seed)
    return [amount.resolve(num_experts, name="client.budget") for amount in amounts]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("12GB", 12_000_000_000),
        ("600MB", 600_000_000),
        ("1.5GiB", 1_610_612_736),
        ("800 kB", 800_000),
        ("800KB", 800_000),
        ("2KiB", 2048),
        ("3MiB", 3 * 1024**2),
        ("1TB", 10**12),
        ("1TiB", 1024**4),
        ("4096", 4096),
        ("7B", 7),
        ("  7 B ", 7),
        ("0.1GB", 100_000_000),  # 0.1 in binary would be a byte off in larger units
        ("1.2345kB", 1234),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert sizes(text) == (num_bytes,) * 3


@pytest.mark.parametrize(
    ("text", "num_experts", "expected"),
    [
        ("16", 64, 16),
        ("1", 1, 1),
        ("64", 64, 64),
        ("25%", 64, 16),
        ("25 %", 10, 2),
        ("12.5%", 64, 8),
        ("29%", 100, 29),  # 0.29 * 100 is below 29 in floating point
        ("100%", 1728, 1728),
        ("100.0%", 7, 7),
        ("1%", 64, 0),
    ],
)
def test_experts(text: str, num_experts: int, expected: int) -> None:
    assert counts(text, num_experts) == [expected] * 3


def test_a_list_gives_one_to_each_client() -> None:
    assert sizes("1GB, 2GB,512MiB") == (10**9, 2 * 10**9, 512 * 1024**2)
    assert counts("4, 50%, 8", 32) == [4, 16, 8]
    assert sizes("7", num_clients=1) == (7,)


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 2**32 - 1))
def test_draws_lie_between_the_ends(low: int, more: int, seed: int) -> None:
    high = low + more
    drawn = sizes(f"uniform({low}kB, {high}kB)", num_clients=5, seed=seed)
    assert len(drawn) == 5
    assert all(low * 1000 <= size <= high * 1000 for size in drawn)
    numbers = counts(f"uniform({low}, {high})", 2000, num_clients=5, seed=seed)
    assert all(low <= number <= high for number in numbers)


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_drawn_shares_lie_between_the_ends(first: int, second: int, seed: int) -> None:
    low, high = sorted((first, second))
    for amount in experts(f"uniform({low}%, {high}%)", seed=seed):
        assert amount.is_share
        assert Fraction(low, 100) <= amount.value <= Fraction(high, 100)


def test_draws_are_of_whole_numbers_and_reach_both_ends() -> None:
    assert set(counts("uniform(2, 4)", 64, num_clients=100)) == {2, 3, 4}
    assert {*counts("uniform(98%, 100%)", 100, num_clients=100)} == {98, 99, 100}


def test_draws_are_uniform() -> None:
    drawn = sizes("uniform(12GB, 32GB)", num_clients=4000)
    assert np.mean(drawn) == pytest.approx(22e9, rel=0.02)
    assert np.std(drawn) == pytest.approx(20e9 / 12**0.5, rel=0.03)
    shares = [float(amount.value) for amount in experts("uniform(25%, 75%)", num_clients=4000)]
    assert np.mean(shares) == pytest.approx(0.5, rel=0.02)


def test_ends_that_are_equal_leave_nothing_to_chance() -> None:
    assert sizes("uniform(3GB,3GB)") == (3 * 10**9,) * 3
    assert counts("uniform(29%, 29%)", 100) == [29] * 3
    assert counts("uniform (5, 5)", 64) == [5] * 3


@pytest.mark.parametrize("text", ["uniform(1GB, 9GB)", "uniform(1kB, 9TB)"])
def test_draws_depend_on_the_generator_alone(text: str) -> None:
    assert sizes(text, seed=1) == sizes(text, seed=1)
    assert sizes(text, seed=1) != sizes(text, seed=2)
    # Another client changes no earlier one's amount.
    assert sizes(text, num_clients=8, seed=1)[:3] == sizes(text, seed=1)


def test_only_uniform_draws() -> None:
    generator = np.random.default_rng(0)
    state = generator.bit_generator.state
    for text in ("16", "1, 2"):
        parse_amounts(text, name="budget", num_clients=2, generator=generator, kind="experts")
    assert generator.bit_generator.state == state


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "nothing"),
        ("  ", "nothing"),
        ("much", "much"),
        ("0", "0"),
        ("0GB", "0GB"),
        ("0.0001kB", "0.0001kB"),
        ("-5GB", "-5GB"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("1e9", "1e9"),
        ("1.5", "1.5"),
        ("12gb", "12gb"),
        ("12 G", "12 G"),
        ("25%", "25%"),
        ("9223372036854775808", "9223372036854775808"),
        ("9" * 5000, "9" * 5000),
        ("1GB,,2GB", "nothing in 1GB,,2GB"),
        ("1GB, 2GB,", "nothing in 1GB, 2GB,"),
        ("uniform(0, 1GB)", "0 in uniform(0, 1GB)"),
        ("uniform(1GB, inf)", "inf in uniform(1GB, inf)"),
        ("uniform(1GB, 25%)", "25% in uniform(1GB, 25%)"),
        ("uniform(1GB)", "uniform(1GB)"),
        ("uniform(1GB, 2GB, 3GB)", "uniform(1GB in uniform(1GB, 2GB, 3GB)"),
        ("uniform(1GB, 2GB), 3GB", "uniform(1GB in uniform(1GB, 2GB), 3GB"),
        ("normal(1GB, 2GB)", "normal(1GB in normal(1GB, 2GB)"),
    ],
)
def test_what_is_no_size_is_an_error(text: str, got: str) -> None:
    message = f"client.memory must be sizes above 0, got {got}; write such as 12GB, "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        sizes(text)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1.5", "0%", "-5%", "100.1%", "nan%", "nan", "inf", "12GB", "%", "9" * 30],
)
def test_what_is_no_amount_of_experts_is_an_error(text: str) -> None:
    rule = "numbers of experts or shares of at most 100%, above 0"
    message = f"client.budget must be {rule}, got {text or 'nothing'}; write such as 16 or 25%, "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        experts(text)


@pytest.mark.parametrize(("text", "number"), [("1, 2", 2), ("1, 2, 3, 4", 4)])
def test_a_list_of_another_length_is_an_error(text: str, number: int) -> None:
    message = (
        "client.budget must give one amount for all or one for each of the 3 clients, "
        f"got {number} in {text}; "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        experts(text)


@pytest.mark.parametrize("text", ["uniform(9, 8)", "uniform(50%, 49.9%)"])
def test_ends_in_the_wrong_order_are_an_error(text: str) -> None:
    message = f"client.budget must draw from low to high, got {text}; "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        experts(text)
    with pytest.raises(ValueError, match=r"^client\.memory must draw from low to high, "):
        sizes("uniform(1GiB, 1GB)")


@pytest.mark.parametrize("text", ["uniform(4, 50%)", "uniform(25%, 64)"])
def test_ends_of_two_kinds_are_an_error(text: str) -> None:
    message = f"client.budget must draw between two numbers or two shares, got {text}; "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        experts(text)


def test_more_experts_than_there_are_is_an_error() -> None:
    message = "client.budget must be at most the 64 experts of the model, got 65; "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        counts("65", 64)


@settings(deadline=None)
@given(st.text(alphabet="0123456789.,%()kKMGTiB- uniform", max_size=24), st.sampled_from([1, 3]))
@example("٣", 1)
@example("1\n", 1)
def test_any_text_gives_amounts_or_an_error_in_one_form(text: str, num_clients: int) -> None:
    parsers: tuple[Callable[[str, int], Sized], ...] = (sizes, experts)
    for parse in parsers:
        message = ""
        try:
            assert len(parse(text, num_clients)) == num_clients
        except ValueError as error:
            message = str(error)
        assert re.fullmatch(r"(client\.\w+ must .*, got .*; .*)?", message, re.DOTALL)
