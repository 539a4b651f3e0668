"""Whatever fails reaches a person as one line in the form of Orchard's own errors."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from federations import QUICK, short_model
from orchard.cli import app
from orchard.cli.errors import clear_errors, describe
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog, write_atomically

FORM = re.compile(r"error: .+ must .+, got .+; .+")
FULL = Path("/dev/full")  # whoever writes to it is told that no space is left


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def jinja(folder: Path) -> None:
    import jinja2

    jinja2.Environment(undefined=jinja2.StrictUndefined).from_string("{{ a.b }}").render()


def jinja_syntax(folder: Path) -> None:
    import jinja2

    jinja2.Environment().from_string("{% if %}")


def safetensors(folder: Path) -> None:
    from safetensors.torch import load

    load(b"\0" * 4)


def tokenizers(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (folder / "tokenizer.json").write_text("{}")
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def datasets(folder: Path) -> None:
    from datasets import load_dataset

    load_dataset("json", data_files=str(folder / "nowhere.jsonl"), cache_dir=str(folder))


def arrow(folder: Path) -> None:
    import pyarrow.parquet

    (folder / "rows.parquet").write_text("no parquet")
    pyarrow.parquet.read_table(folder / "rows.parquet")


def broken_json(folder: Path) -> None:
    json.loads('{"a": ')


def not_utf8(folder: Path) -> None:
    b"caf\xe9".decode()


def no_file(folder: Path) -> None:
    (folder / "nothing.txt").read_text()


def no_right(folder: Path) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/locked/x")


def a_folder(folder: Path) -> None:
    folder.read_text()


def no_answer(folder: Path) -> None:
    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def no_extra(folder: Path) -> None:
    raise ModuleNotFoundError("No module named 'cryptography'", name="cryptography.x509")


def no_memory(folder: Path) -> None:
    raise MemoryError


RAISED = [
    (jinja, "chat template of the tokenizer must render, got UndefinedError: 'a' is undefined"),
    (jinja_syntax, "chat template of the tokenizer must render, got TemplateSyntaxError"),
    (safetensors, "must be a whole safetensors file, got SafetensorError"),
    (tokenizers, "tokenizer's files must be"),
    (datasets, "nowhere.jsonl"),
    (arrow, "the data must be whole"),
    (broken_json, "a JSON file must be valid JSON, got JSONDecodeError"),
    (not_utf8, "text must be UTF-8, got byte 0xe9 at place 3"),
    (no_file, "nothing.txt must exist, got No such file"),
    (no_right, "/locked/x must be open to this user, got Permission denied"),
    (a_folder, "must be usable, got Is a directory"),
    (no_answer, "the other side must answer, got Connection refused"),
    (no_extra, "cryptography must be installed, got no such package; install"),
    (no_memory, "memory must suffice"),
]


@pytest.mark.parametrize(("fail", "words"), RAISED, ids=[fail.__name__ for fail, _ in RAISED])
@pytest.mark.parametrize("code", [1, 2])
def test_errors_of_libraries_and_systems_are_one_line_in_our_form(
    fail: Callable[[Path], None],
    words: str,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit) as left, clear_errors(code=code, traceback=False):
        fail(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert FORM.fullmatch(line), line
    assert words in line
    assert left.value.exit_code == code


@pytest.mark.parametrize("fail", [fail for fail, _ in RAISED])
def test_traceback_raises_the_error_itself(fail: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(Exception) as raised, clear_errors(code=2, traceback=True):  # noqa: PT011
        fail(tmp_path)
    assert not isinstance(raised.value, typer.Exit)


def test_a_mistake_of_ours_is_one_line_too_and_nobodys_input(
    capsys: pytest.CaptureFixture[str],
) -> None:
    held: dict[str, int] = {}
    with pytest.raises(typer.Exit) as left, clear_errors(code=2, traceback=False):
        held["key"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("failed, got KeyError: 'key'; --traceback shows where")
    assert left.value.exit_code == 1


def test_our_own_errors_stay_as_they_are_with_their_notes() -> None:
    with pytest.raises(FileNotFoundError) as raised:
        read_recipe(Path("nowhere.toml"))
    assert describe(raised.value) == str(raised.value)
    raised.value.add_note("in round 3")
    assert describe(raised.value) == f"{raised.value} (in round 3)"


def test_traceback_may_stand_before_the_command_or_behind_it() -> None:
    for arguments in (("--traceback", "plan", "no.toml"), ("plan", "no.toml", "--traceback")):
        assert isinstance(call(*arguments).exception, FileNotFoundError)
    assert isinstance(call("plan", "no.toml").exception, SystemExit)


def test_a_tokenizer_that_is_none_is_told_before_training(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in Path(short_model()).iterdir():
        (model / path.name).symlink_to(path)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").write_text("{}")
    result = call("run", "tiny/fedavg", f"model.path={model}", "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert FORM.fullmatch(line), line
    assert not (tmp_path / "run").exists()


def test_what_is_written_whole_or_not_at_all_names_its_file_where_no_space_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*result\.json") as raised:
        write_atomically(tmp_path / "result.json", b"{}")
    assert raised.value.filename == str(tmp_path / "result.json")
    assert "go on with orchard resume" in describe(raised.value)


def test_a_log_without_space_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    log = MetricsLog(folder / "metrics.jsonl")
    log.path.symlink_to(FULL)
    with pytest.raises(OSError, match="No space left") as raised:
        log.append({"kind": "round", "round": 1})
    assert raised.value.filename == str(log.path)


def test_no_space_for_a_checkpoint_is_one_line_and_the_run_goes_on_when_there_is_some(
    tmp_path: Path,
) -> None:
    more = [f"model.path={short_model()}", "server.rounds=1", "client.steps=1"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        failed = call("run", "tiny/fedavg", *QUICK, *more, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.exit_code == 1, failed.output
    (line,) = failed.stderr.splitlines()
    assert FORM.match(line), line
    assert "run/checkpoints/round_000001/shared.safetensors must be where there is space" in line
    assert "orchard resume" in line
    assert call("resume", tmp_path / "run").exit_code == 0
