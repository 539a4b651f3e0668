from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.data.datasets import (
    Example,
    Fields,
    content_hash,
    is_client_folder,
    load_examples,
    read_client_folder,
    read_hub,
    read_jsonl,
)
from orchard.data.examples import Turn

FIELDS = Fields()
ROW = {"instruction": "Add 1 and 1.", "response": "2"}


def write(path: Path, *rows: object) -> Path:
    """Write rows as JSON, and text as it is, one a line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the hub library off the network and its cache out of the home folder."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


# read_jsonl


def test_reads_every_part_of_an_example_as_it_stands(tmp_path: Path) -> None:
    row = {"instruction": " Sum up. ", "response": "Ça va\n", "context": "Text", "category": "qa"}
    assert read_jsonl(write(tmp_path / "a.jsonl", row), FIELDS) == [
        Example(instruction=" Sum up. ", response="Ça va\n", context="Text", category="qa")
    ]


def test_context_and_category_may_be_missing_or_null(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, "context": None, "category": None})
    assert read_jsonl(path, FIELDS) == [Example("Add 1 and 1.", "2")] * 2


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    row = {"instruction": "Answer truthfully", "input": "What is B12?", "output": "A vitamin."}
    fields = Fields(instruction="input", response="output", context="", category="")
    assert read_jsonl(write(tmp_path / "a.jsonl", row), fields) == [
        Example("What is B12?", "A vitamin.")
    ]


def test_an_empty_field_name_turns_a_column_off(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**ROW, "context": "left out", "category": "left out"})
    assert read_jsonl(path, Fields(context="", category="")) == [Example("Add 1 and 1.", "2")]


@pytest.mark.parametrize(("number", "text"), [(42, "42"), (0, "0"), (2.5, "2.5"), (-3, "-3")])
def test_numbers_are_read_as_their_text(tmp_path: Path, number: float, text: str) -> None:
    path = write(tmp_path / "a.jsonl", {**ROW, "response": number, "category": number})
    assert read_jsonl(path, FIELDS) == [Example("Add 1 and 1.", text, category=text)]


def test_blank_lines_a_bom_and_windows_line_ends_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps(ROW).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert read_jsonl(path, FIELDS) == [Example("Add 1 and 1.", "2")] * 2


def test_unicode_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {**ROW, "response": "one\u2028two\x85three"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [example.response for example in read_jsonl(path, FIELDS)] == ["one\u2028two\x85three"]


WRONG_LINES = {
    "no json": ('{"instruction": "a", ', "must be one JSON object, got"),
    "deeply nested": ("[" * 100_000, "must be one JSON object, got"),
    "list": ([1, 2], r"must be one JSON object, got '\[1, 2\]'"),
    "text": ('"hello"', "must be one JSON object, got"),
    "no response": (
        {"instruction": "a", "output": "b"},
        "must have the column 'response', got 'instruction', 'output'",
    ),
    "no columns": ({}, "must have the column 'instruction', got none"),
    "chat messages": (
        {**ROW, "response": [{"role": "user"}]},
        "must be text or a number, got list",
    ),
    "boolean": ({**ROW, "response": True}, "must be text or a number, got bool"),
    "not a number": ('{"instruction": "a", "response": NaN}', "must be text or a number"),
    "null response": ({**ROW, "response": None}, "must be text or a number, got NoneType"),
    "object as context": ({**ROW, "context": {"a": 1}}, "must be text or a number, got dict"),
    "empty instruction": ({**ROW, "instruction": ""}, "must not be empty, got ''"),
    "blank response": ({**ROW, "response": " \n"}, "must not be empty, got"),
    "lone surrogate": ('{"instruction": "a", "response": "\\ud800"}', "must be valid Unicode"),
}


@pytest.mark.parametrize(("line", "message"), WRONG_LINES.values(), ids=WRONG_LINES.keys())
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "train.jsonl", ROW, "", line)
    with pytest.raises(ValueError, match=rf"line 3 of .*train\.jsonl {message}") as error:
        read_jsonl(path, FIELDS)
    assert "; " in str(error.value), "the message must say what to do"


def test_bytes_that_are_no_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"instruction": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* must be UTF-8 text, got the byte 0xe9"):
        read_jsonl(path, FIELDS)


def test_an_explicitly_named_column_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**ROW, "subject": "math"})
    with pytest.raises(ValueError, match=r"must have the column 'topic', got .*'subject'"):
        read_jsonl(path, Fields(category="topic"))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path must be an existing file, got .*no\.jsonl"):
        read_jsonl(tmp_path / "no.jsonl", FIELDS)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="path must be a file of examples, got the folder"):
        read_jsonl(tmp_path, FIELDS)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have at least one example"):
        read_jsonl(write(tmp_path / "a.jsonl", "", " "), FIELDS)


@pytest.mark.parametrize("part", ["instruction", "response"])
def test_a_required_field_must_have_a_name(part: str) -> None:
    with pytest.raises(ValueError, match=rf"fields\.{part} must name a column, got ''"):
        Fields(**{part: ""})


# read_client_folder


def test_one_client_for_each_file_in_the_order_of_ids(tmp_path: Path) -> None:
    for client_id in ("b", "a-1", "a"):
        write(tmp_path / f"{client_id}.jsonl", {**ROW, "response": client_id})
    write(tmp_path / "notes.txt", "not read")
    write(tmp_path / "._a.jsonl", "not read either")
    (tmp_path / "old.jsonl").mkdir()
    clients = read_client_folder(tmp_path, FIELDS)
    assert list(clients) == ["a", "a-1", "b"]
    assert [examples[0].response for examples in clients.values()] == ["a", "a-1", "b"]
    assert is_client_folder(tmp_path)


def test_a_client_without_examples_is_named(tmp_path: Path) -> None:
    write(tmp_path / "full.jsonl", ROW)
    write(tmp_path / "hospital_3.jsonl", "")
    with pytest.raises(ValueError, match="client 'hospital_3' must have at least one example"):
        read_client_folder(tmp_path, FIELDS)


def test_a_wrong_line_names_the_client_file(tmp_path: Path) -> None:
    write(tmp_path / "clinic.jsonl", ROW, "{")
    with pytest.raises(ValueError, match=r"line 2 of .*clinic\.jsonl must be one JSON object"):
        read_client_folder(tmp_path, FIELDS)


def test_a_folder_without_clients_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder must have at least one \.jsonl file, got none"):
        read_client_folder(tmp_path, FIELDS)
    assert not is_client_folder(tmp_path)


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder must exist, got"):
        read_client_folder(tmp_path / "none", FIELDS)


def test_a_file_is_no_client_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW)
    with pytest.raises(NotADirectoryError, match="folder must be a folder"):
        read_client_folder(path, FIELDS)


# read_hub and load_examples


@pytest.mark.usefixtures("offline")
def test_reads_a_local_dataset_through_the_hub_library(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict(
        {
            "question": ["q1", "q2", "q3"],
            "answer": [1, 2, 3],
            "topic": [1, 0, -1],
        },
        features=datasets.Features(
            question=datasets.Value("string"),
            answer=datasets.Value("int64"),
            topic=datasets.ClassLabel(names=["art", "law"]),
        ),
    )
    folder = tmp_path / "exam"
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")
    fields = Fields(instruction="question", response="answer", category="topic")
    wanted = [
        Example("q1", "1", category="law"),
        Example("q2", "2", category="art"),
        Example("q3", "3", category=""),
    ]
    assert read_hub(str(folder), split="train", fields=fields) == wanted
    assert load_examples(str(folder), fields, split="train[:2]") == wanted[:2]
    with pytest.raises(ValueError, match=r"row 1 of .* must have the column 'instruction', got"):
        read_hub(str(folder), split="train", fields=FIELDS)
    with pytest.raises(ValueError, match=r"split and subset must be in the dataset .*'dev'"):
        read_hub(str(folder), split="dev", fields=fields)


@pytest.mark.usefixtures("offline")
def test_an_unknown_dataset_says_what_was_looked_for() -> None:
    with pytest.raises((ConnectionError, FileNotFoundError), match=r"dataset must be .*no/such"):
        load_examples("no/such", FIELDS)


def test_an_existing_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.txt", ROW)
    assert load_examples(str(path), FIELDS) == [Example("Add 1 and 1.", "2")]


@pytest.mark.parametrize("path", ["no.jsonl", "./no", "/no/such", "~/no-such-file", "a/b/c"])
def test_what_looks_like_a_path_never_goes_to_the_hub(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="path must be an existing file"):
        load_examples(path, FIELDS)


def test_a_client_folder_is_no_single_pool(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROW)
    with pytest.raises(ValueError, match="path must be one pool of examples, got the folder"):
        load_examples(str(tmp_path), FIELDS)


def test_importing_the_module_does_not_load_the_hub_library() -> None:
    code = "import sys, orchard.data.datasets; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# content_hash


@settings(deadline=None)
@given(st.text(), st.text(min_size=1), st.sampled_from([" ", "\n", "\t \u00a0", "   "]))
def test_white_space_category_and_the_border_of_context_do_not_count(
    context: str, response: str, space: str
) -> None:
    apart = Example("Sum this up", response, context=context, category="a")
    joined = Example(f"{space}sum  THIS up{space}{context}", f"{response}{space}", category="b")
    assert content_hash(apart) == content_hash(joined)


def test_another_response_or_prompt_is_another_content() -> None:
    examples = [Example("a b", "c"), Example("a", "b c"), Example("a b", "c d"), Example("b", "c")]
    assert len({content_hash(example) for example in examples}) == len(examples)


def test_what_was_said_before_is_content() -> None:
    before = ((), ("user", "a", "assistant", "b"), ("user", "a b", "assistant", "c"))
    before += (("system", "a", "user", "a", "assistant", "b"), ("user", "A ", "assistant", "b"))
    hashes = [
        content_hash(Example("c", "d", history=tuple(map(Turn, said[::2], said[1::2]))))
        for said in before
    ]
    assert len(set(hashes)) == len(hashes) - 1
    assert hashes[1] == hashes[-1]
