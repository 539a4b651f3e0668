"""What the README tells a newcomer to type exists and works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchard.cli import app

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LINES = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines()]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [line.removeprefix("make ") for line in LINES if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in (*targets, "check"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("orchard ")])
def test_commands_exist_with_their_options(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    result = CliRunner().invoke(app, words)
    if words[0] in ("ls", "show"):
        assert result.exit_code == 0
    else:
        # There is no such data and no such run here: refused for that, and for nothing else.
        assert result.exit_code == 2
        assert re.search(r"error: .*(examples\.jsonl|runs/mine|MODEL)", result.stderr)
