"""The last number of an answer, however it is written."""

from __future__ import annotations

from decimal import Decimal

import pytest

from orchard.evaluation.last_number import find_last_number, last_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She makes 9 * 2 = $18 every day.\n#### 18", "18"),
        ("$1,234.50", "1234.5"),
        ("\u20ac 12", "12"),
        ("1,234.50%", "1234.5"),
        ("-22.22 percent", "-22.22"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("from 5 to \u22123", "-3"),
        ("x=-3", "-3"),
        ("+7", "7"),
        ("- 5 apples", "5"),  # an item of a list
        ("3-4", "4"),
        ("2019\u20132020", "2020"),
        ("COVID-19", "19"),
        ("(5)", "5"),
        ("18.", "18"),
        ("0.500", "0.5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("007", "7"),
        ("1,2,3", "3"),  # a list, no thousands
        ("73,260, 57,768 thousand", "57768"),
        ("1/2", "2"),
        ("none", None),
        ("", None),
    ],
)
def test_numbers_are_found_however_they_are_written(text: str, expected: str | None) -> None:
    assert find_last_number(text) == (None if expected is None else Decimal(expected))


def test_only_the_last_number_of_both_counts() -> None:
    references = ["2 + 3 = 5\n#### 5", "$1,496.5 million", "#### 5", "#### 5"]
    predictions = ["so it is 5.00", "1496.50", "5 of 6", "five"]
    assert last_number(predictions, references) == [True, True, False, False]


def test_a_reference_without_a_number_is_compared_as_a_whole() -> None:
    assert last_number([" Annual basis", "Annual", "7"], ["Annual basis"] * 3) == [
        True,
        False,
        False,
    ]


def test_there_is_an_answer_for_each_reference() -> None:
    with pytest.raises(ValueError, match=r"predictions must be as many as references \(2\), got 1"):
        last_number(["1"], ["1", "2"])
