"""Small changes of the source, which scripts/mutants.py shows to the tests."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from mutants import choose_tests, summarize  # noqa: E402
from mutation.following import Covered, Following  # noqa: E402
from mutation.sites import KINDS, ROOMS, SOURCE, draw_sample, find_mutants, locate  # noqa: E402

TEXT = '''\
"""1 + 1"""
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    SIDE = 3


@decorated(4)
def double(number: Literal[5], *, times: int = 2) -> int:
    """Say 6 < 7."""
    assert number > 8
    if number < 0 and (times
                       # or
                       or not number):
        raise ValueError(f"{number + 1} must be above {0}")
    note(number)
    return number * times
'''
FILE = f"{SOURCE}/server/doubling.py"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    path = tmp_path / FILE
    path.parent.mkdir(parents=True)
    path.write_text(TEXT)
    return tmp_path


def test_places_of_every_kind_are_found_and_no_other(repository: Path) -> None:
    found = {(m.line, m.what, m.old, m.new) for m in find_mutants(repository, FILE)}
    condition = TEXT[TEXT.index("number < 0") : TEXT.index(":\n        raise")]
    error = TEXT[TEXT.index("raise") : TEXT.index("\n    note")]
    assert found == {
        (9, "number", "2", "3"),
        (9, "number", "2", "1"),
        (12, "condition", condition, f"(not ({condition}))"),
        (12, "comparison", "<", "<="),
        (12, "comparison", "<", ">="),
        (12, "number", "0", "1"),
        (12, "number", "0", "-1"),
        (12, "connective", "and", "or"),
        (14, "connective", "or", "and"),
        (14, "not", "not number", "(number)"),
        (15, "raise", error, "pass"),
        (16, "call", "note(number)", "pass"),
        (17, "operator", "*", "/"),
    }
    assert {m.line for m in find_mutants(repository, FILE) if m.at_import} == {9}


def test_a_mutant_changes_its_place_alone(repository: Path) -> None:
    source = TEXT.encode()
    for mutant in find_mutants(repository, FILE):
        changed = mutant.apply(source)
        ast.parse(changed)
        assert len(changed) - len(source) == len(mutant.new) - len(mutant.old)
        with pytest.raises(ValueError, match="locate the sample in this source"):
            mutant.apply(b"\n" * 30)


def test_a_mutant_is_found_again_by_its_line(repository: Path) -> None:
    mutants = find_mutants(repository, FILE)
    (repository / FILE).write_text("import os\n\n" + TEXT.replace("note(number)", "note()"))
    for mutant in mutants:
        again = locate(mutant, repository)
        if mutant.what == "call":
            assert again is None
        else:
            assert again is not None
            assert (again.line, again.column) == (mutant.line + 2, mutant.column)
            assert (again.old, again.new) == (mutant.old, mutant.new)


@pytest.mark.long
def test_a_sample_is_reproducible_and_has_every_room_and_kind() -> None:
    sample = draw_sample(ROOT, size=150, seed=0)
    assert sample == draw_sample(ROOT, size=150, seed=0)
    assert sample != draw_sample(ROOT, size=150, seed=1)
    assert Counter(m.room for m in sample) == dict.fromkeys(ROOMS, 20) | {"elsewhere": 30}
    kinds = Counter(KINDS[m.what] for m in sample)
    assert kinds.keys() == set(KINDS.values())
    assert min(kinds.values()) >= 30
    assert len({(m.file, m.line, m.column) for m in sample}) == 150


def test_tests_that_execute_the_line_run_the_cheapest_first(repository: Path) -> None:
    (mutant,) = (m for m in find_mutants(repository, FILE) if m.what == "call")
    seconds = {"a::slow": 9.0, "a::quick": 0.1, "b::quick": 0.2, "c::other": 0.1}
    lines = {FILE: {16: ["a::slow", "b::quick", "a::quick"], 17: ["c::other"]}}
    covered = Covered("", seconds, [], lines)
    assert choose_tests(mutant, covered, {}) == ["b::quick", "a::quick", "a::slow"]
    # What runs at import is seen by all who use the module, and those that import from it.
    default = replace(mutant, at_import=True)
    covered.lines["other.py"] = {1: ["d::importer"]}
    seconds["d::importer"] = 0.3
    assert set(choose_tests(default, covered, {FILE: {"other.py"}})) == set(seconds)


def test_what_is_made_once_belongs_to_every_test_that_uses_it() -> None:
    contexts: list[str] = []
    following = Following(contexts.append, [Path(__file__).parent])
    from functools import cache

    @following.caching(cache)
    def made(number: int) -> int:
        return number if number == 0 else made(number - 1)

    for test, number in (("one", 1), ("two", 1), ("three", 0)):
        with following.inside(test):
            assert made(number) == 0
        following.seconds[test] += 1
    of_zero, of_one = (f"{__name__}.{made.__qualname__} ({n},) {{}}" for n in (0, 1))
    assert contexts == ["one", of_one, of_zero, of_one, "one", "", "two", "", "three", ""]
    assert following.tests_of([of_zero, of_one, "one"]) == {
        of_zero: {"one", "two", "three"},
        of_one: {"one", "two"},
        "one": {"one"},
    }
    following.failed.add("two")
    assert following.tests_of([of_one]) == {of_one: {"one"}}


def test_nothing_tried_is_no_share() -> None:
    assert summarize([]) == {}
