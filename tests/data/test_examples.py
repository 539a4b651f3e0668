"""Rows of the usual benchmarks become examples with options; bad rows say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchard.data.datasets import read_hub, read_jsonl
from orchard.data.examples import Example, Fields, example_from_row

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
AG_NEWS = Fields(wording="Which topic?", context="text", response="label", labels=TOPICS)
PIQA = Fields(instruction="goal", options=("sol1", "sol2"), response="label", answer="index")
MMLU = Fields(
    instruction="question",
    options=("choices",),
    response="answer",
    category="subject",
    answer="index",
    letters=True,
)
HELLASWAG = Fields(
    wording="{activity_label}: {ctx}",
    options=("endings",),
    response="label",
    category="activity_label",
    answer="index",
)
AG_NEWS_ROW = {"text": "Stocks rose. On Monday.", "label": "Business"}
PIQA_ROW = {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Turn the table.", "label": 0}
MMLU_ROW = {
    "subject": "abstract_algebra",
    "question": "How many elements has Z_3?",
    "choices": ["0", "1", "2", "3"],
    "answer": 3,
}
HELLASWAG_ROW = {
    "activity_label": "Removing ice from car",
    "ctx_a": "A man sits in a car.",
    "ctx_b": "he",
    "ctx": "A man sits in a car. he",
    "endings": ["scrapes the window.", "sings.", "eats a cake.", "sleeps."],
    "label": "0",
}


def read(row: dict[str, Any], fields: Fields) -> Example:
    return example_from_row(row, fields=fields, where="line 1 of a.jsonl")


def test_a_labeled_text() -> None:
    assert read(AG_NEWS_ROW, AG_NEWS) == Example(
        "Which topic?", "Business", context="Stocks rose. On Monday.", options=TOPICS
    )


def test_options_in_columns() -> None:
    options = ("Turn the lid.", "Turn the table.")
    assert read(PIQA_ROW, PIQA) == Example("Open a jar.", options[0], options=options)
    assert read({**PIQA_ROW, "label": 1}, PIQA).response == options[1]


def test_options_in_a_list_behind_letters() -> None:
    assert read(MMLU_ROW, MMLU) == Example(
        "How many elements has Z_3?\nA. 0\nB. 1\nC. 2\nD. 3",
        "D",
        category="abstract_algebra",
        options=("A", "B", "C", "D"),
    )


def test_options_in_a_list_as_texts_and_an_index_as_text() -> None:
    assert read(HELLASWAG_ROW, HELLASWAG) == Example(
        "Removing ice from car: A man sits in a car. he",
        "scrapes the window.",
        category="Removing ice from car",
        options=tuple(HELLASWAG_ROW["endings"]),
    )


def test_letters_stand_before_the_context_which_a_long_prompt_loses_first() -> None:
    example = read(AG_NEWS_ROW, Fields(**{**vars(AG_NEWS), "letters": True}))
    assert example.instruction == ("Which topic?\nA. World\nB. Sports\nC. Business\nD. Sci/Tech\n")
    assert example.context == "Stocks rose. On Monday."
    assert (example.response, example.options) == ("C", ("A", "B", "C", "D"))


def test_without_options_any_text_is_a_response() -> None:
    row = {"instruction": "Add 1 and 1.", "response": 2}
    assert read(row, Fields()) == Example("Add 1 and 1.", "2")


def test_a_number_is_an_index_only_where_the_recipe_says_so() -> None:
    row = {"question": "1 + 1?", "choices": ["1", "2", "3"], "answer": 2}
    fields = Fields(instruction="question", options=("choices",), response="answer")
    assert read(row, fields).response == "2"
    assert read(row, Fields(**{**vars(fields), "answer": "index"})).response == "3"


def test_letters_with_an_index_may_name_equal_options() -> None:
    row = {**MMLU_ROW, "choices": ["0", "1", "1", "3"]}
    assert read(row, MMLU).instruction.endswith("B. 1\nC. 1\nD. 3")


WRONG_ROWS: dict[str, tuple[dict[str, Any], Fields, str]] = {
    "unknown label": (
        {**AG_NEWS_ROW, "label": "Wrld"},
        AG_NEWS,
        "column 'label' in line 2 of {} must be one of 'World', 'Sports', .* got 'Wrld'",
    ),
    "index of a label": ({**AG_NEWS_ROW, "label": 2}, AG_NEWS, "got '2'; .* data.answer = index"),
    "index too large": (
        {**PIQA_ROW, "label": 2},
        PIQA,
        r"column 'label' in line 2 of {} must be an index in 0\.\.1, got '2'",
    ),
    "index below zero": ({**PIQA_ROW, "label": -1}, PIQA, r"must be an index in 0\.\.1, got '-1'"),
    "index no number": ({**MMLU_ROW, "answer": "D"}, MMLU, r"an index in 0\.\.3, got 'D'"),
    "index a fraction": ({**PIQA_ROW, "label": 0.5}, PIQA, r"in 0\.\.1, got '0\.5'"),
    "no option column": (
        {k: v for k, v in PIQA_ROW.items() if k != "sol2"},
        PIQA,
        "line 2 of {} must have the column 'sol2', got 'goal', 'sol1', 'label'",
    ),
    "no list of options": (
        {k: v for k, v in MMLU_ROW.items() if k != "choices"},
        MMLU,
        "line 2 of {} must have the column 'choices'",
    ),
    "empty option": (
        {**PIQA_ROW, "sol2": " "},
        PIQA,
        "column 'sol2' in line 2 of {} must not be empty",
    ),
    "empty option in a list": (
        {**HELLASWAG_ROW, "endings": ["a", "b", "", "d"]},
        HELLASWAG,
        r"column 'endings\[2\]' in line 2 of {} must not be empty",
    ),
    "option that is no text": (
        {**HELLASWAG_ROW, "endings": ["a", None]},
        HELLASWAG,
        r"column 'endings\[1\]' in line 2 of {} must be text or a number, got NoneType",
    ),
    "text for a list": (
        {**MMLU_ROW, "choices": "A or B"},
        MMLU,
        "column 'choices' in line 2 of {} must be a list of options, got str 'A or B'",
    ),
    "one option": (
        {**HELLASWAG_ROW, "endings": ["a"]},
        HELLASWAG,
        r"options \('endings'\) in line 2 of {} must be 2 or more, got 1",
    ),
    "more options than letters": (
        {**MMLU_ROW, "choices": [str(n) for n in range(27)]},
        MMLU,
        "must be 2 to 26 with letters = true, got 27",
    ),
    "equal options": (
        {**PIQA_ROW, "sol2": PIQA_ROW["sol1"]},
        PIQA,
        r"options \('sol1', 'sol2'\) in line 2 of {} must differ, got 'Turn the lid\.' more",
    ),
    "no column of the wording": (
        {"endings": ["a", "b"], "label": 0},
        HELLASWAG,
        "line 2 of {} must have the column 'activity_label'",
    ),
    "empty wording": (
        {"q": " ", "sol1": "a", "sol2": "b", "label": 0},
        Fields(**{**vars(PIQA), "wording": "{q}"}),
        "wording '{{q}}' must not be empty in line 2 of {}",
    ),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_a_wrong_row_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    row, fields, message = WRONG_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=message.format(r".*rows\.jsonl")) as error:
        read_jsonl(path, fields)
    assert "; " in str(error.value), "the message must say what to do"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": TOPICS, "options": ("a",)}, "only one of fields.labels and fields.options"),
        ({"labels": ("World",)}, "fields.labels must be 2 or more, got 1"),
        ({"labels": ("World", "World")}, "fields.labels must differ, got 'World' more than once"),
        ({"answer": "index"}, "must be given with answer = index, got neither"),
        ({"letters": True}, "must be given with letters = true, got neither"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fields(**settings)


def test_class_labels_of_the_hub_are_read_as_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    news = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [3, 0]},
        features=datasets.Features(
            text=datasets.Value("string"), label=datasets.ClassLabel(names=list(TOPICS))
        ),
    )
    (tmp_path / "news").mkdir()
    news.to_parquet(tmp_path / "news" / "train.parquet")
    found = read_hub(str(tmp_path / "news"), split="train", fields=AG_NEWS)
    assert [example.response for example in found] == ["Sci/Tech", "World"]
    # PIQA's labels are classes named 0 and 1 there, and its hidden ones are -1.
    piqa = datasets.Dataset.from_dict(
        {"goal": ["a", "b"], "sol1": ["c", "c"], "sol2": ["d", "d"], "label": [1, -1]},
        features=datasets.Features(
            goal=datasets.Value("string"),
            sol1=datasets.Value("string"),
            sol2=datasets.Value("string"),
            label=datasets.ClassLabel(names=["0", "1"]),
        ),
    )
    (tmp_path / "piqa").mkdir()
    piqa.to_parquet(tmp_path / "piqa" / "train.parquet")
    (first,) = read_hub(str(tmp_path / "piqa"), split="train[:1]", fields=PIQA)
    assert first.response == "d"
    with pytest.raises(ValueError, match=r"column 'label' in row 2 of .* must be text or a number"):
        read_hub(str(tmp_path / "piqa"), split="train", fields=PIQA)
