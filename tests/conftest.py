"""Its place puts ``tests/`` on the path, so that every test can import ``tiny_models``."""

from __future__ import annotations

import pytest

_LONGEST = "test_packaging.py"  # one test of it installs the package where nothing else is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker ends long after the others."""
    items.sort(key=lambda item: item.path.name != _LONGEST)
