"""Ways to answer that contradict each other: one for each client, by its place among the clients.

Two clients are asked the same and must answer differently, so no one model serves both unless it
is told who asks. That is what personal models are for, here on text that people wrote.

- ``label_names``: client ``k`` calls label ``i`` by the name of label ``(i + k) mod n``, in the
  order of ``data.labels``. Texts and the set of names are the same for all clients.
- ``answer_form``: client ``k`` wants its answers in the form ``k mod 4`` of ``ANSWER_FORMS``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from orchard.data.examples import Example
from orchard.data.turns import Turn

CONVENTIONS = ("label_names", "answer_form")

LEAD_IN = "Here is my answer:"

# A sentence ends with a mark and white space, or with its line. An abbreviation counts as an end
# where what follows does not begin in lower case.
_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?![a-z])|\s*\n\s*")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, without the white space around them; at least one."""
    found, start = [], 0
    for end in _END.finditer(text):
        found.append(text[start : end.end()].strip())
        start = end.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence] or [text]


def _upper_case(text: str) -> str:
    return text.upper()


def _first_sentence(text: str) -> str:
    return sentences(text)[0]


def _numbered_list(text: str) -> str:
    return "\n".join(f"{n}. {sentence}" for n, sentence in enumerate(sentences(text), start=1))


def _quoted(text: str) -> str:
    return f'{LEAD_IN} "{text.strip()}"'


ANSWER_FORMS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "UPPER CASE": _upper_case,
        "the first sentence": _first_sentence,
        "a numbered list of its sentences": _numbered_list,
        "in quotes after a lead-in": _quoted,
    }
)
"""What a form is called, to what makes it of an answer, in the order of clients."""


def convention_name(conventions: str, place: int, labels: Sequence[str]) -> str:
    """Return what a client's convention is, in words.

    Args:
        conventions: Of ``CONVENTIONS``.
        place: The client's, from 0.
        labels: The labels of ``label_names``.
    """
    if conventions == "label_names":
        named = (f"{label} -> {_renamed(label, labels, place)}" for label in labels)
        return ", ".join(named)
    return list(ANSWER_FORMS)[place % len(ANSWER_FORMS)]


def restate(examples: Sequence[Example], conventions: str, place: int) -> list[Example]:
    """Return a client's examples as its own convention has them.

    Instructions, contexts, categories and options stay; of a conversation the assistant's earlier
    turns follow the form too.

    Args:
        examples: As they are for all clients.
        conventions: Of ``CONVENTIONS``.
        place: The client's, from 0.

    Raises:
        ValueError: ``label_names``, and an example has no options.
    """
    if conventions == "label_names":
        return [_relabeled(example, place) for example in examples]
    form = list(ANSWER_FORMS.values())[place % len(ANSWER_FORMS)]
    return [
        replace(
            example,
            response=form(example.response),
            history=tuple(
                Turn(turn.role, form(turn.text)) if turn.role == "assistant" else turn
                for turn in example.history
            ),
        )
        for example in examples
    ]


def _relabeled(example: Example, place: int) -> Example:
    if not example.options:
        raise ValueError(
            "examples must have labels for data.conventions = label_names, got one without; give "
            "data.labels"
        )
    return replace(example, response=_renamed(example.response, example.options, place))


def _renamed(label: str, labels: Sequence[str], place: int) -> str:
    return labels[(labels.index(label) + place) % len(labels)]
