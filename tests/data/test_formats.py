"""Known formats are recognized by their columns; what is taken and what is not read is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchard.data.datasets import content_hash, read_file
from orchard.data.examples import Example, Fields, Turn
from orchard.data.formats import Format
from orchard.data.reading import Reader, Reading, reading_notes

USER, ANSWER = "Is it red?", "It is."
BEFORE = (Turn("user", "Hello"), Turn("assistant", "Hi"))
RULE = Turn("system", "Be brief.")


def read(path: Path, *rows: Mapping[str, Any], reader: Reader | None = None) -> Reading:
    file = path / "data.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return read_file(file, reader or Reader())


def said(*turns: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> list[Any]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


TALK = (("user", "Hello"), ("assistant", "Hi"), ("user", USER), ("assistant", ANSWER))
GPT_TALK = (("human", "Hello"), ("gpt", "Hi"), ("human", USER), ("gpt", ANSWER))
PLAIN, TOLD = Example(USER, ANSWER), Example(USER, ANSWER, context="A rose.")
ROWS: dict[str, tuple[str, dict[str, Any], Example]] = {
    "dolly": ("", {"instruction": USER, "context": "A rose.", "response": ANSWER}, TOLD),
    "alpaca": ("alpaca", {"instruction": USER, "input": "A rose.", "output": ANSWER}, TOLD),
    "alpaca without input": ("alpaca", {"instruction": USER, "output": ANSWER}, PLAIN),
    "gpteacher": (
        "instruction",
        {"instruction": USER, "input": "A rose.", "response": ANSWER},
        TOLD,
    ),
    "alpaca with turns": (
        "alpaca",
        {
            **{"instruction": USER, "input": "A rose.", "output": ANSWER},
            **{"system": "Be brief.", "history": [["Hello", "Hi"]]},
        },
        Example(USER, ANSWER, context="A rose.", history=(RULE, *BEFORE)),
    ),
    "gsm8k": ("question_answer", {"question": USER, "answer": ANSWER}, PLAIN),
    "context_qa": (
        "question_answer",
        {"question": USER, "answer": ANSWER, "context": "A rose."},
        TOLD,
    ),
    "open_orca": (
        "question_answer",
        {"system_prompt": "Be brief.", "question": USER, "response": ANSWER},
        Example(USER, ANSWER, history=(RULE,)),
    ),
    "trl": ("prompt_completion", {"prompt": USER, "completion": ANSWER}, PLAIN),
    "trl with turns": (
        "prompt_completion",
        {"prompt": said(*TALK[:3]), "completion": said(TALK[3])},
        Example(USER, ANSWER, history=BEFORE),
    ),
    "prompt and response": ("prompt_completion", {"prompt": USER, "response": ANSWER}, PLAIN),
    "flan": ("input_output", {"inputs": USER, "targets": ANSWER}, PLAIN),
    "messages": (
        "messages",
        {"messages": said(("system", "Be brief."), *TALK)},
        Example(USER, ANSWER, history=(RULE, *BEFORE)),
    ),
    "messages in parts": (
        "messages",
        {"messages": said(TALK[2], ("assistant", [{"type": "text", "text": ANSWER}]))},
        PLAIN,
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": said(*GPT_TALK, keys=("from", "value"))},
        Example(USER, ANSWER, history=BEFORE),
    ),
    "sharegpt with a system column": (
        "sharegpt",
        {"conversations": said(*GPT_TALK, keys=("from", "value")), "system": "Be brief."},
        Example(USER, ANSWER, history=(RULE, *BEFORE)),
    ),
    "a system turn that says nothing": (
        "messages",
        {"messages": said(("system", ""), *TALK[2:])},
        PLAIN,
    ),
}


@pytest.mark.parametrize(("format", "row", "wanted"), ROWS.values(), ids=ROWS.keys())
def test_a_format_is_recognized_and_said(
    tmp_path: Path, format: str, row: Mapping[str, Any], wanted: Example
) -> None:
    reading = read(tmp_path, row, row)
    assert reading.examples == [wanted] * 2
    assert not reading.unread
    assert reading.taken.partition(" ")[0] == format
    assert all(repr(column) in reading.taken for column in row) or not format


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row[0]])
def test_a_format_that_is_named_reads_the_same(tmp_path: Path, name: str) -> None:
    format, row, wanted = ROWS[name]
    if format == "instruction":
        reader = Reader(Fields(context="input"), format="instruction")
    else:
        reader = Reader(format=format)  # type: ignore[arg-type]
    reading = read(tmp_path, row, reader=reader)
    assert (reading.examples, reading.taken) == ([wanted], "")


def test_the_format_that_most_rows_have_is_taken(tmp_path: Path) -> None:
    odd = {"instruction": "What?", "response": "That."}
    talk = {"messages": said(*TALK)}
    reading = read(tmp_path, odd, talk, talk, reader=Reader(bad_rows="skip"))
    assert reading.examples == [Example(USER, ANSWER, history=BEFORE)] * 2
    assert len(reading.bad) == 1


def test_columns_that_the_recipe_names_win(tmp_path: Path) -> None:
    row = {"instruction": USER, "input": "A rose.", "output": ANSWER, "better": "Yes."}
    named = read(tmp_path, row, reader=Reader(Fields(response="better")))
    assert named.examples == [Example(USER, "Yes.", context="A rose.")]
    assert named.unread == {"output": 1}
    asked = read(tmp_path, row, reader=Reader(Fields(instruction="input", response="output")))
    assert asked.examples == [Example("A rose.", ANSWER)]
    assert set(asked.unread) == {"instruction", "better"}
    # As data.response=output alone was read before there were formats; the context is kept.
    half = read(tmp_path, row, reader=Reader(Fields(response="output")))
    assert half.examples == [TOLD]
    none = read(tmp_path, row, reader=Reader(Fields(response="output", context="")))
    assert none.examples == [PLAIN]
    assert none.unread == {"input": 1, "better": 1}
    assert none.hints == {"input": "Alpaca's context: data.context=input"}


def test_what_is_not_read_is_named_once_with_its_count(tmp_path: Path) -> None:
    rows = [
        {"instruction": USER, "response": ANSWER, "id": n, "tools": "x" if n else None, "no": ""}
        for n in range(3)
    ]
    reading = read(tmp_path, *rows)
    assert reading.unread == {"id": 3, "tools": 2}
    (note,) = reading_notes({"a": reading, "b": reading}, of="data.path")
    assert note == (
        "columns of data.path that are not read: 'id' (6 rows), 'tools' (4 rows; probably what "
        "tools the assistant has, which Orchard does not read)"
    )


def test_what_turns_hold_beside_their_text_is_named(tmp_path: Path) -> None:
    talk = said(*TALK)
    talk[1]["weight"] = 0
    reading = read(tmp_path, {"messages": talk})
    assert reading.unread == {"messages[].weight": 1}
    assert "whether a turn is learned" in reading.hints["messages[].weight"]


def test_a_history_that_is_none_is_no_history_and_named(tmp_path: Path) -> None:
    row = {"instruction": USER, "response": ANSWER, "history": "Smoker, 45."}
    reading = read(tmp_path, row)
    assert reading.examples == [PLAIN]
    assert reading.hints == {"history": "something else than a list of earlier turns"}
    with pytest.raises(ValueError, match=r"'history' in line 1 .* must be a list of pairs"):
        read(tmp_path, row, reader=Reader(format="instruction"))
    off = read(tmp_path, row, reader=Reader(Fields(history=""), format="instruction"))
    assert off.examples == [PLAIN]


def test_notes_say_which_client_was_read_as_what(tmp_path: Path) -> None:
    north = read(tmp_path, ROWS["alpaca"][1])
    south = read(tmp_path, ROWS["dolly"][1])
    (note,) = reading_notes({"north": north, "south": south}, of="data.path")
    assert note == (
        "data.path of 'north' is read as alpaca (instruction from 'instruction', context from "
        "'input', response from 'output'); data.format says it otherwise"
    )


REFUSED = {
    "preferences": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "whether each is wanted": {"prompt": "a", "completion": "b", "label": False},
    "steps with labels": {"prompt": "a", "completions": ["b"], "labels": [True]},
    "tokens": {"input_ids": [1], "attention_mask": [1]},
    "segments": {"segments": [{"text": "a", "label": True}]},
    "text without a response": {"text": "a"},
    "prompts without a response": {"prompt": "a"},
    "got 'who', 'what'": {"who": "a", "what": "b"},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_data_of_another_kind_of_training_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=f"must .*{kind}.*; ") as caught:
        read(tmp_path, REFUSED[kind])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"must have a list of turns in 'messages' of a row \(format messages\)"),
        ({"messages": "[]"}, "must have a list of turns in 'messages' of a row"),
        ({"conversations": ["q", "a"]}, "must have a list of turns in 'conversations' of a row"),
        (
            {"instruction": "q", "response": None},
            "must have values in 'instruction' and 'response'",
        ),
        (
            {"prompt": "q", "completion": None},
            r"must have values in 'prompt' and 'completion' of a",
        ),
    ],
)
def test_columns_of_a_format_without_its_values_are_refused_by_name(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, row)


def test_the_better_answers_of_preferences_can_be_named(tmp_path: Path) -> None:
    fields = Fields(instruction="prompt", response="chosen")
    reading = read(tmp_path, REFUSED["preferences"], reader=Reader(fields))
    assert reading.examples == [Example("a", "b")]
    assert "rejected" in reading.unread


BROKEN: dict[str, tuple[Any, str]] = {
    "ends with a request": (said(*TALK[:3]), "must end with a turn of the assistant"),
    "begins with an answer": (said(*TALK[1:]), "got the first turn from assistant"),
    "two requests": (said(TALK[0], *TALK[2:]), "got the turn after user's from user"),
    "a late system turn": (
        said(*TALK[:2], ("system", "x"), *TALK[2:]),
        "must have one system turn, the first, or none, got another as turn 3",
    ),
    "a tool": (said(TALK[2], ("tool", "x"), TALK[3]), "must be from system, user or assistant"),
    "no text": (said(TALK[2], ("assistant", " ")), "turn 2 of .* must be text, got str ' '"),
    "null": ([*said(TALK[2]), *said(("assistant", None))], "must be text, got NoneType"),
    "a picture": (
        [{"role": "user", "content": [{"type": "image"}]}, *said(TALK[3])],
        "must be text alone, got the part",
    ),
    "no role": ([{"content": "x"}, *said(TALK[3])], "turn 1 of .* must have a role and a content"),
    "no list": ("Hello", "must be a list of turns, got str"),
    "nothing": ([], "must end with a turn of the assistant, got the last turn from nobody"),
    "only a system turn": (said(("system", "x")), "got the last turn from nobody"),
    "half a character": (said(TALK[2], ("assistant", "\ud800")), "must be valid Unicode"),
}


@pytest.mark.parametrize(("turns", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_conversation_is_a_bad_row(tmp_path: Path, turns: Any, message: str) -> None:
    good = {"messages": said(*TALK)}
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, good, good, {"messages": turns})
    assert "column 'messages' in line 3 of " in str(caught.value)
    reading = read(tmp_path, good, good, {"messages": turns}, reader=Reader(bad_rows="skip"))
    assert (len(reading.examples), len(reading.bad)) == (2, 1)


def test_two_system_turns_are_a_bad_row(tmp_path: Path) -> None:
    row = {"messages": said(("system", "a"), *TALK), "system": "b"}
    with pytest.raises(ValueError, match=r"one system turn, .* got another as turn 2; join them"):
        read(tmp_path, row)


def test_a_developer_is_who_a_system_turn_is_from(tmp_path: Path) -> None:
    rows = ({"messages": said((role, "Be short."), *TALK)} for role in ("developer", "system"))
    by_developer, by_system = read(tmp_path, *rows).examples
    assert by_developer == by_system
    assert by_system.history[0].role == "system"


@pytest.mark.parametrize("format", ["instruction", "alpaca", "input_output"])
def test_a_conversation_column_goes_with_formats_of_conversations(
    tmp_path: Path, format: Format
) -> None:
    row = {"dialog": said(*TALK)}
    reader = Reader(Fields(conversation="dialog"))
    assert read(tmp_path, row, reader=reader).examples[0].history == BEFORE
    with pytest.raises(ValueError, match=r"data\.format must be messages or sharegpt"):
        read(tmp_path, row, reader=Reader(Fields(conversation="dialog"), format=format))


def test_labels_are_options_of_the_last_answer_of_a_conversation(tmp_path: Path) -> None:
    fields = Fields(labels=("It is.", "It is not."))
    (example,) = read(tmp_path, {"messages": said(*TALK)}, reader=Reader(fields)).examples
    assert (example.options, example.history) == (("It is.", "It is not."), BEFORE)


@pytest.mark.parametrize("label", ["None", "NA", "null", "nan", "00"])
def test_words_for_nothing_are_labels_as_any_other(tmp_path: Path, label: str) -> None:
    (tmp_path / "a.csv").write_text(f"instruction,response\nAny?,{label}\n")
    reader = Reader(Fields(labels=(label, "yes")))
    (example,) = read_file(tmp_path / "a.csv", reader).examples
    assert (example.response, example.options) == (label, (label, "yes"))


def test_another_history_is_another_content() -> None:
    histories = [(), BEFORE, (RULE,), (RULE, *BEFORE)]
    found = {content_hash(Example(USER, ANSWER, history=history)) for history in histories}
    assert len(found) == len(histories)
