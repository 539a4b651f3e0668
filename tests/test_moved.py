from __future__ import annotations

import importlib
import importlib.util

import pytest

from orchard.moved import MOVED, MOVED_NAMES


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_says_where_it_went_and_that_is_there(old: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"must be imported as {MOVED[old]}, got"):
        importlib.import_module(old)
    assert importlib.util.find_spec(MOVED[old]) is not None


@pytest.mark.parametrize("old", MOVED_NAMES)
def test_an_old_name_says_where_it_went_and_that_is_there(old: str) -> None:
    module, _, name = old.rpartition(".")
    with pytest.raises(ImportError, match=f"must be imported from {MOVED_NAMES[old]}, got"):
        exec(f"from {module} import {name}")
    assert hasattr(importlib.import_module(MOVED_NAMES[old]), name)


def test_what_was_never_here_is_missing_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'orchard\.nothing'"):
        importlib.import_module("orchard.nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from orchard.experiment import nothing")
