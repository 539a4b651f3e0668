"""Whether an answer ends at the right number, however either of them is written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from orchard.evaluation.rouge import check_lengths, exact_match

# A sign counts where no word, number or bracket stands before it: 3-4 is two numbers, COVID-19 is
# one of 19. A comma belongs to a number where three digits follow it in every group.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.,)\]])[-\u2212\u2013+])?"
    r"(?:[$\u20ac\u00a3\u00a5]\s?)?"
    r"(?P<inner>(?<=[$\u20ac\u00a3\u00a5])[-\u2212\u2013])?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
)


def find_last_number(text: str) -> Decimal | None:
    """Return the last number that a text names; None where it names none.

    Currency and percent signs, commas between thousands, a plus, leading and trailing zeros do not
    count; a minus does. So ``$1,234.50`` is 1234.5, and ``-5%`` is -5. Words for numbers and for
    scales (million) are not read, nor are fractions: ``1/2`` ends at 2.
    """
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    if found is None:
        return None
    number = Decimal(found["digits"].replace(",", ""))
    signs = f"{found['sign'] or ''}{found['inner'] or ''}"
    return -number if set(signs) & set("-\u2212\u2013") else number


def last_number(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Say of each prediction whether its last number is that of its reference.

    So GSM8K is scored, whose references end in ``#### 18``. Where a reference has no number, as
    many of TAT-QA, both are compared as a whole, as in ``exact_match``.

    Source: Cobbe et al., 2021, arXiv:2110.14168, compare what follows ``####``; the last number of
    any answer is what is usual for models that do not write it.

    Raises:
        ValueError: The two have different lengths.
    """
    check_lengths(predictions, references)
    whole = exact_match(predictions, references)
    scores = []
    for prediction, reference, is_same in zip(predictions, references, whole, strict=True):
        wanted = find_last_number(reference)
        scores.append(is_same if wanted is None else find_last_number(prediction) == wanted)
    return scores
