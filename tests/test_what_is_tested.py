"""The page of what is tested names a test that is there in every row."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_docs  # noqa: E402

PAGE = ROOT / "docs" / "what_is_tested.md"
_ROW = re.compile(r"^\| (?!what holds)(.+) \| (.+) \|$", re.MULTILINE)


def test_every_row_names_tests_that_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = _ROW.findall(text)
    assert len(rows) > 40
    for what, tests in rows:
        named = re.findall(r"`tests/[\w/]+\.py::test_\w+`", tests)
        assert named or re.search(r"`make test-\w+`", tests), what
    assert list(check_docs.check_names(text)) == []


def test_a_test_that_is_not_there_is_found() -> None:
    (problem,) = check_docs.check_names("`tests/test_site.py::test_nothing`")
    assert problem.endswith("which does not exist")
