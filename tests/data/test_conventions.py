"""Answers by a client's own convention: forms of text, and names of labels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from orchard.data.conventions import ANSWER_FORMS, convention_name, restate, sentences
from orchard.data.examples import Example
from orchard.data.turns import Turn

TEXT = "It is hot. Mr. fox drank 2.5 litres of tea!\nSo did e.g. the owl?"
LABELS = ("World", "Sports", "Business")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, ["It is hot.", "Mr. fox drank 2.5 litres of tea!", "So did e.g. the owl?"]),
        ('He said "Go." Then he left', ['He said "Go."', "Then he left"]),
        ("one\n\n  two  \n", ["one", "two"]),
        ("2019", ["2019"]),
        ("!", ["!"]),
    ],
)
def test_sentences_end_with_a_mark_or_a_line(text: str, expected: Sequence[str]) -> None:
    assert sentences(text) == expected


def test_each_of_four_clients_has_a_form_of_its_own_and_the_fifth_the_first() -> None:
    example = Example("What?", "It is hot. Go", context="It is.", category="talk")
    answers = [restate([example], "answer_form", place) for place in range(5)]
    assert [own.response for (own,) in answers] == [
        "IT IS HOT. GO",
        "It is hot.",
        "1. It is hot.\n2. Go",
        'Here is my answer: "It is hot. Go"',
        "IT IS HOT. GO",
    ]
    for (own,) in answers:
        assert (own.instruction, own.context, own.category) == ("What?", "It is.", "talk")
    assert len(ANSWER_FORMS) == 4
    assert convention_name("answer_form", 5, ()) == "the first sentence"


def test_earlier_turns_of_the_assistant_follow_the_form_and_those_of_others_do_not() -> None:
    history = (Turn("system", "Be kind."), Turn("user", "a b"), Turn("assistant", "c d"))
    (own,) = restate([Example("e", "f", history=history)], "answer_form", 0)
    assert [turn.text for turn in own.history] == ["Be kind.", "a b", "C D"]


def test_clients_call_the_labels_by_each_others_names() -> None:
    examples = [Example("topic?", label, options=LABELS) for label in LABELS]
    named = [
        [own.response for own in restate(examples, "label_names", place)] for place in range(4)
    ]
    assert named[0] == ["World", "Sports", "Business"]
    assert named[1] == ["Sports", "Business", "World"]
    assert named[2] == ["Business", "World", "Sports"]
    assert named[3] == named[0]
    # All names are used by everybody, so what a client is asked does not tell who it is.
    assert all(own.options == LABELS for own in restate(examples, "label_names", 1))
    name = convention_name("label_names", 1, LABELS)
    assert name == "World -> Sports, Sports -> Business, Business -> World"


def test_names_of_labels_need_labels() -> None:
    with pytest.raises(ValueError, match=r"examples must have labels for data\.conventions"):
        restate([Example("a", "b")], "label_names", 0)
