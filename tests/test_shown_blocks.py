"""Every block of shell or Python that README and docs show runs, or says why it does not.

The blocks of a page run one after another in one folder, as a reader would type them, with the tiny
model for MODEL, small files under the names that pages use, and short runs (``shown_orchard``).
Blocks of ``orchard`` commands alone run in this process, which spares each its imports; others in
a shell that finds ``warm_orchard``. A block that cannot run is behind a comment with the reason::

    <!-- not run: needs three machines -->

A block that begins with a file's name in a comment is written to that file. A text block behind
``<!-- what it prints -->`` is what the block before it prints.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import shown_orchard
import warm_orchard
from orchard.cli import app
from orchard.data import world

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("bash", "sh", "console", "python")
# One page in the daily tests; the others are long.
SAMPLE = "docs/how-to/use_your_data.md"
DOLLY = ("closed_qa", "information_extraction", "classification", "summarization")

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run|what it prints)(?:: (?P<reason>[^\n]*?))? -->\n+)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    code: str
    mark: str
    reason: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(m["language"], m["code"], m["mark"] or "", m["reason"] or "") for m in found]


def runs(page: Path) -> list[Block]:
    """Return the blocks of a page that are run."""
    return [b for b in blocks(page) if b.language in RUN and b.mark != "not run"]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_is_run_or_says_why_not(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    # No fence and no mark escapes the pattern above.
    assert len(re.findall(r"^ *(```|~~~)", text, re.MULTILINE)) == 2 * len(found)
    shown = "".join(block.code for block in found)
    marks = re.compile("<!-- *(?:not run|what it prints)")
    assert len(marks.findall(text)) - len(marks.findall(shown)) == sum(
        bool(b.mark) for b in found
    ) + len(re.findall(r"`<!-- not run", text))
    for before, block in zip([None, *found], found, strict=False):
        assert block.language, f"a block must name its language:\n{block.code}"
        if block.mark == "not run":
            assert block.language in RUN
            assert len(block.reason.split()) >= 3, f"the reason must say why:\n{block.code}"
        if block.mark == "what it prints":
            assert before is not None
            assert before.language in RUN
            assert before.mark != "not run"


def test_the_page_of_the_sample_has_a_block() -> None:
    assert runs(ROOT / SAMPLE)


def test_a_command_is_shortened_only_where_it_runs_and_does_not_say_otherwise() -> None:
    assert shown_orchard.shortened(["show", "tiny/flex"]) == ["show", "tiny/flex"]
    typed = ["run", "r.toml", "model.path=MODEL", "server.rounds=3", "--out", "o"]
    assert shown_orchard.shortened(typed) == [
        *("run", "r.toml", "model.path=orchard:tiny", "server.rounds=3", "--out", "o"),
        *("client.steps=2", "evaluation.max_examples=2", "evaluation.retention_path="),
        "evaluation.max_new_tokens=4",
    ]


@pytest.fixture(scope="module")
def warm() -> Iterator[Path]:
    with (
        tempfile.TemporaryDirectory(prefix="orchard-test-") as folder,
        warm_orchard.warm(Path(folder) / "warm") as path,
    ):
        yield path


@pytest.mark.long
@pytest.mark.parametrize("page", [p for p in PAGES if runs(p)], ids=name)
def test_the_blocks_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: Path
) -> None:
    folder = tmp_path / "reader"
    write_files(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{make_commands(tmp_path, warm)}{os.pathsep}{os.environ['PATH']}")
    printed = ""
    for block in blocks(page):
        if block.mark == "what it prints":
            assert printed == block.code
        elif title := re.match(r"# *([\w.-]+\.(?:toml|py))\n", block.code):
            Path(title[1]).write_text(block.code)
        elif block.language in RUN and block.mark != "not run":
            commands = plain_commands(block)
            if commands is not None:
                for command in commands:
                    done = CliRunner().invoke(app, shown_orchard.shortened(command))
                    assert done.exit_code == 0, f"{command}\n{done.output}{done.exception!r}"
            else:
                printed = run_elsewhere(block)


def plain_commands(block: Block) -> list[list[str]] | None:
    """Return the arguments of a block's commands, where all are ``orchard`` without a shell."""
    if block.language == "python" or re.search(r"[$|>;*&`(]", re.sub(r"uniform\(", "", block.code)):
        return None
    lines = [shlex.split(line, comments=True) for line in block.code.splitlines()]
    lines = [words for words in lines if words]
    return [words[1:] for words in lines] if all(w[0] == "orchard" for w in lines) else None


def run_elsewhere(block: Block) -> str:
    """Run a block in a process of its own and return what it prints."""
    program = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euc"]
    done = subprocess.run([*program, block.code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{block.code}\n{done.stdout}{done.stderr}"
    return done.stdout


def make_commands(folder: Path, warm: Path) -> Path:
    """Write the commands that a shell finds: this Python, and ``orchard`` with short runs."""
    commands = folder / "bin"
    commands.mkdir()
    warm_orchard.write_command(commands / "orchard", shown_orchard.__file__, warm)
    (commands / "python").write_text(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    (commands / "python").chmod(0o755)
    return commands


def write_files(folder: Path) -> None:
    """Write small files under the names that pages use for a reader's data."""
    (folder / "clients").mkdir(parents=True)
    offices = world.offices(0)
    rows = [
        {"instruction": e.instruction, "response": e.response, "category": e.category}
        for office in offices
        for e in office.train[:40]
    ]
    write(folder / "examples.jsonl", rows)
    for number, client in enumerate(("north", "south")):
        write(folder / "clients" / f"{client}.jsonl", rows[40 * number : 40 * number + 40])
    for file in ("general.jsonl", "other.jsonl"):
        write(folder / file, rows[:5])
    for file, times in (("POOL.jsonl", 25), ("databricks-dolly-15k.jsonl", 6)):
        write(
            folder / file,
            [
                {
                    "instruction": f"{number} {row['instruction']}",
                    "response": row["response"],
                    "category": DOLLY[number % len(DOLLY)],
                }
                for number, row in enumerate(times * rows)
            ],
        )
    topics = ("World", "Sports", "Business", "Sci/Tech")
    texts = [f"{i} {row['instruction']}" for i, row in enumerate(4 * rows)]
    write(
        folder / "ag_news.jsonl",
        [{"text": text, "label": topics[i % 4]} for i, text in enumerate(texts)],
    )
    write(
        folder / "test.jsonl",
        [
            {"question": text, "choices": list("abcd"), "answer": i % 4, "subject": f"s{i % 2}"}
            for i, text in enumerate(texts)
        ],
    )
    write(
        folder / "validation.jsonl",
        [
            {"goal": text, "sol1": "one", "sol2": "two", "label": i % 2}
            for i, text in enumerate(texts)
        ],
    )


def write(path: Path, rows: list[dict[str, object]] | list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
