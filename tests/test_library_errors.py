from __future__ import annotations

import pytest

from orchard.library_errors import first_line


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("one\ntwo", "one"),
        ("\n  one  \ntwo", "one"),
        ("what failed:\n  this\nat place", "what failed: this"),
        ("announced:", "announced:"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
    ],
)
def test_what_a_library_says_is_one_line(said: str, line: str) -> None:
    assert first_line(ValueError(said)) == line
