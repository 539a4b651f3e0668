"""How the documentation becomes a site; make check builds the whole of it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_site  # noqa: E402


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    build_site.Pages(folder).write()
    return folder


def test_every_page_is_in_the_navigation_and_no_other(
    pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_site, "PAGES", pages)
    assert list(build_site.missing_in_nav()) == []
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    for name in build_site._leaves(config["project"]["nav"]):
        assert (pages / name).is_file(), name
    new = pages / "docs" / "new.md"
    new.write_text("# New\n")
    try:
        assert [found for found in build_site.missing_in_nav() if "docs/new.md" in found]
    finally:
        new.unlink()


def test_every_link_of_the_pages_leads_to_a_file_of_the_site(pages: Path) -> None:
    for page in pages.rglob("*.md"):
        prose = build_site._FENCE.sub("", page.read_text(encoding="utf-8"))
        for link in build_site._LINK.finditer(prose):
            if "://" not in link[2]:
                assert (page.parent / link[2]).is_file(), f"{page}: {link[0]}"


def test_a_script_that_a_page_links_to_is_shown_whole(pages: Path) -> None:
    shown = (pages / "examples" / "add_a_method.py.md").read_text(encoding="utf-8")
    assert (ROOT / "examples" / "add_a_method.py").read_text(encoding="utf-8").rstrip() in shown


def test_the_api_shows_every_module_of_the_package() -> None:
    shown = [module for modules in build_site.rooms().values() for module in modules]
    for path in (ROOT / "src" / "orchard").rglob("*.py"):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        if "flower_bundle" in parts:
            continue
        module = ".".join(parts).removesuffix(".__init__")
        assert module in shown or module.rpartition(".")[0] in shown, module


def test_a_link_out_of_the_project_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must lead to a file of the project"):
        build_site.Pages(tmp_path)._relink(ROOT / "README.md", "[x](../elsewhere.md)")


def test_what_a_built_page_lacks_or_would_fetch_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#here">b</a><a href="c.html">c</a>'
        '<a href="#nowhere">n</a><a href="https://example.org">free to lead there</a>'
        '<script src="https://example.org/x.js"></script>'
        '<link rel="stylesheet" href="//x.org/s.css">'
    )
    (tmp_path / "b.html").write_text('<p id="here">B</p><a href="a.html#top">a</a>')
    assert sorted(build_site.broken(tmp_path)) == [
        "a.html leads to #nowhere, but there is no such place",
        "a.html leads to c.html, which is not there",
        "a.html would fetch //x.org/s.css",
        "a.html would fetch https://example.org/x.js",
    ]
