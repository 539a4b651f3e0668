"""A page as people see it: in Chromium, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def browser() -> Iterator[Any]:
    """Have Chromium while the context lasts.

    Raises:
        Skipped: Playwright or Chromium is not there.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium, such as Debian's package of that name")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened_page(page: Path, *, width: int) -> Iterator[Any]:
    """Have a page that is drawn, and that neither complains nor asks for anything else."""
    said: list[str] = []
    asked: list[str] = []
    with browser() as chromium:
        opened = chromium.new_page(viewport={"width": width, "height": 900})
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(page.as_uri())
        opened.wait_for_selector("html[data-drawn='1']")
        yield opened
    assert said == []
    assert set(asked) == {page.as_uri()}
