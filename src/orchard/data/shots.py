"""Examples before a question: how a test example is asked after others of its kind.

Each is a turn of the user and its answer, before the question, so a prompt that is too long loses
them first, the oldest before the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchard.data.examples import Example
from orchard.data.templates import prompt_text
from orchard.data.turns import Turn


def with_shots(
    examples: Sequence[Example], pool: Sequence[Example], number: int, *, of: str
) -> list[Example]:
    """Return examples behind so many others of their category, the first of the pool.

    An example of the pool that asks the same with the same context is never shown.

    Args:
        examples: What is asked; none has earlier turns.
        pool: What is shown, in its order.
        number: How many before each.
        of: What named the pool, for messages.

    Raises:
        ValueError: The pool has too few of a category; or an example has earlier turns of its own.
    """
    by_category: dict[str, list[Example]] = {}
    for example in pool:
        by_category.setdefault(example.category, []).append(example)
    found = []
    for example in examples:
        if example.history:
            raise ValueError(
                "evaluation.shots must be 0 with test examples of several turns, got "
                f"{number}; what is shown before would stand as if it had been said"
            )
        others = [
            other
            for other in by_category.get(example.category, ())
            if prompt_text(other) != prompt_text(example)
        ][:number]
        if len(others) < number:
            category = f"the category {example.category!r}" if example.category else "all"
            raise ValueError(
                f"{of} must hold at least {number} other examples of {category}, got "
                f"{len(others)}; add some, or lower evaluation.shots"
            )
        turns = [
            turn
            for other in others
            for turn in (Turn("user", prompt_text(other)), Turn("assistant", other.response))
        ]
        found.append(replace(example, history=tuple(turns)))
    return found
