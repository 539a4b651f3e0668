"""Draw the pictures of a run's page in docs/pictures: RUN... as for orchard report.

Needs Chromium and playwright. Widths are those that the page is made for.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

from playwright.sync_api import sync_playwright

from orchard.pages.writing import write_page

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
# Width and height in pixels, and the color scheme.
WINDOWS: tuple[tuple[int, int, Literal["light", "dark"]], ...] = (
    (400, 1600, "light"),
    (1000, 1500, "dark"),
    (1600, 1500, "light"),
)


def main(runs: list[str]) -> None:
    """Write a picture for each window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        page = Path(folder) / "page.html"
        write_page(runs, page)
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, height, scheme in WINDOWS:
            opened = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            opened.goto(page.as_uri())
            opened.wait_for_selector("html[data-drawn]")
            opened.screenshot(path=PICTURES / f"report_{width}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
