"""What docs/security.md says is stopped has a test, and the test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
_NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`")


def lines_with_a_test() -> list[str]:
    """Return every line of a table whose last column is called test."""
    found, is_inside = [], False
    for line in PAGE.splitlines():
        if line.startswith("|") and line.endswith("| test |"):
            is_inside = True
        elif not line.startswith("|"):
            is_inside = False
        elif is_inside and not line.startswith("|---"):
            found.append(line)
    return found


LINES = lines_with_a_test()


@pytest.mark.parametrize("line", LINES, ids=[line[2:60] for line in LINES])
def test_every_line_names_tests_that_are_there(line: str) -> None:
    named = _NAMED.findall(line.rsplit("|", 2)[1])
    assert named, line
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name, f"{path} must be followed by the name of a test"
        assert name in tests, f"{path} has no {name}"


def test_the_kinds_before_and_after_name_one_test_each() -> None:
    before_and_after = PAGE.partition("## Before and after")[2]
    rows = [line for line in LINES if line in before_and_after]
    assert len(rows) >= 45
    assert all(_NAMED.findall(row)[0][1] for row in rows)
