"""Test examples behind others of their category: these carry no loss, and none is the asked one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federations import RECIPES, short_model
from orchard.data.examples import Example
from orchard.data.shots import with_shots
from orchard.data.turns import Turn
from orchard.experiment.checking import check_between_sites
from orchard.experiment.preparation import Experiment, data_notes, prepare_experiment
from orchard.models.stored.loading import load_tokenizer
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe

FREE = ("data.options=", "data.letters=false", "data.answer=text", "evaluation.metrics=loss")


def question(number: int, subject: str = "sums") -> Example:
    return Example(f"What is {number}?", "AB"[number % 2], category=subject, options=("A", "B"))


def test_the_first_others_of_the_category_and_never_the_asked_one() -> None:
    pool = [question(1), question(9, "names"), question(2), question(3)]
    asked, other = with_shots([question(2), question(4)], pool, 2, of="the pool")
    assert asked.history == (
        Turn("user", "What is 1?"),
        Turn("assistant", "B"),
        Turn("user", "What is 3?"),
        Turn("assistant", "B"),
    )
    assert [turn.text for turn in other.history] == ["What is 1?", "B", "What is 2?", "A"]
    with pytest.raises(ValueError, match=r"at least 3 other examples of .* 'sums', got 2"):
        with_shots([question(2)], pool, 3, of="the pool")
    with pytest.raises(ValueError, match="several turns"):
        with_shots([asked], pool, 1, of="the pool")


def mmlu(folder: Path, *overrides: str) -> Recipe:
    def rows(first: int, last: int) -> str:
        made = (
            {"subject": "sums", "question": f"word{n}?", "choices": ["fig", "oak"], "answer": n % 2}
            for n in range(first, last)
        )
        return "".join(f"{json.dumps(row)}\n" for row in made)

    (folder / "test.jsonl").write_text(rows(10, 40))
    (folder / "dev.jsonl").write_text(rows(0, 4))
    options = [
        f"model.path={short_model()}",
        f"data.path={folder / 'test.jsonl'}",
        f"evaluation.shots_path={folder / 'dev.jsonl'}",
        "evaluation.shots=2",
        "evaluation.metrics=accuracy,loss",
        "data.template=plain",
        *overrides,
    ]
    return read_recipe(RECIPES / "mmlu" / "fedavg.toml", options).recipe


def prepare(folder: Path, *overrides: str) -> Experiment:
    return prepare_experiment(mmlu(folder, *overrides))


def test_a_worked_prompt(tmp_path: Path) -> None:
    experiment = prepare(tmp_path)
    tokenizer = load_tokenizer(short_model())
    end = tokenizer.eos_token
    for tested in next(iter(experiment.test.values())):
        encoded = tested.encoded
        text = tokenizer.decode(encoded.input_ids[: encoded.prompt_length])
        shown, asked = text[: text.rindex("word")], text[text.rindex("word") :]
        assert shown == (f"word0?\nA. fig\nB. oak\nA{end}\nword1?\nA. fig\nB. oak\nB{end}\n")
        assert int(asked[4:6]) >= 10
        assert all(label < 0 for label in encoded.labels[: encoded.prompt_length])
        assert [option.prompt_length for option in tested.options] == [encoded.prompt_length] * 2
    trained = next(iter(experiment.train.values()))
    assert all(tokenizer.decode(own.input_ids).count("word") == 1 for own in trained)


def test_what_does_not_fit_is_cut_from_the_oldest_on_and_counted(tmp_path: Path) -> None:
    experiment = prepare(tmp_path, "data.max_tokens=50")
    tokenizer = load_tokenizer(short_model())
    tests = next(iter(experiment.test.values()))
    shown = [tokenizer.decode(tested.encoded.input_ids) for tested in tests]
    assert all("word0" not in text for text in shown)
    notes = " ".join(data_notes(experiment))
    assert f"(earlier turns of {len(tests)})" in notes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.shots_path="], "shots_path must be given with evaluation.shots = 2"),
        (["evaluation.shots=9"], "at least 9 other examples"),
        (["evaluation.shots=0"], "shots_path"),
        ([*FREE, "data.conventions=answer_form"], "shots must be 0 with data.conventions"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path, *overrides)


def test_sites_have_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be 0 between sites"):
        check_between_sites(mmlu(tmp_path))
