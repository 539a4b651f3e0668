"""``orchard preview``: tokens, what is learned and cut, on any terminal, without weights."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from chat_styles import STYLES, styled_tokenizer
from federations import short_model
from orchard.cli import app
from orchard.preview import histogram, make_preview, print_preview, token_texts
from orchard.recipe.reading import read_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "own" / "flex.toml"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint whose weights cannot be read."""
    folder = tmp_path / "model"
    shutil.copytree(short_model(), folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def options(tmp_path: Path, model: Path) -> list[str]:
    rows = [
        {
            "instruction": f"Name {n} 東 " + "many words " * (n % 3) * 20,
            "response": f"word{n} {'ab'[n % 2]}",
            "category": "ab"[n % 2],
        }
        for n in range(20)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"data.path={path}", f"model.path={model}", "data.template=plain"]


def show(options: list[str], *, width: int = 60, encoding: str = "utf-8", client: str = "") -> str:
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding=encoding) as file:
        console = Console(file=file, width=width, no_color=True)
        made = make_preview(read_recipe(RECIPE, options).recipe, client=client)
        print_preview(made, console, num_examples=2)
        file.flush()
        return written.getvalue().decode(encoding)


def test_what_is_learned_is_readable_without_color(options: list[str]) -> None:
    shown = show(options)
    responses = [
        line for line in shown.splitlines() if line.startswith("[") and "{<|end|>}]" in line
    ]
    said = {"".join(line[1:-1].replace("{<|end|>}", "").split("|")) for line in responses}
    assert len(said) == 3  # two training examples and a test example
    assert said <= {f"word{n} a" for n in range(0, 20, 2)}
    assert "a: 9 training and 1 test examples" in shown
    assert "answers end at <|end|>" in shown


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("width", [60, 120])
def test_any_terminal_shows_it(options: list[str], width: int, encoding: str) -> None:
    shown = show(options, width=width, encoding=encoding)
    assert max(map(len, shown.splitlines())) <= width
    assert ("東" if encoding == "utf-8" else "\\u6771") in shown.replace("|", "").replace("\n", "")


def test_what_is_cut_is_said(options: list[str]) -> None:
    shown = show([*options, "data.max_tokens=40"], width=120)
    assert "40 tokens" in shown
    assert "cut: prompt" in shown
    assert "note: " in shown
    assert "training examples were cut to 40 tokens (the prompt of " in shown


def test_options_are_shown_beside_the_right_one(options: list[str]) -> None:
    labels = [f"word{n} {'ab'[n % 2]}" for n in range(20)]
    shown = (
        show([*options, f"data.labels={','.join(labels)}"], width=200)
        .replace("|", "")
        .replace("<end>", "<|end|>")
    )
    others = [line.removeprefix("or: ") for line in shown.splitlines() if line.startswith("or: ")]
    *_, right = (line for line in shown.splitlines() if line.startswith("[word"))
    assert len(others) == len(labels) - 1
    assert {*others, right} == {f"[{label}{{<|end|>}}]" for label in labels}


def test_one_client_is_shown_and_another_is_refused(options: list[str]) -> None:
    assert "b: 9 training and 1 test examples" in show(options, client="b")
    with pytest.raises(ValueError, match="--client must be one of a, b, got c; name one"):
        show(options, client="c")


def test_the_command_shows_it_without_reading_weights(options: list[str]) -> None:
    arguments = ["preview", str(RECIPE), *options, "--client", "b", "--examples", "1"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "training example 1 of 9" in found.output
    assert "training example 2 of 9" not in found.output


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(30, 120))
@settings(deadline=None, max_examples=50)
def test_a_histogram_counts_every_length_once(lengths: list[int], width: int) -> None:
    lines = histogram(lengths, width=width)
    assert max(map(len, lines)) <= width
    counted = 0
    for line in lines:
        low, _, rest = line.strip().partition("-")
        high, count, *bar = rest.split()
        inside = sum(int(low) <= length <= int(high) for length in lengths)
        assert int(count) == inside
        assert bool(bar) == bool(inside)
        counted += inside
    assert counted == len(lengths)


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=50)
def test_texts_of_tokens_make_the_whole(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(ids, TOKENIZER)
    assert len(texts) == len(ids)
    assert "".join(texts) == TOKENIZER.decode(ids)


TOKENIZER = styled_tokenizer(STYLES["chatml"])
