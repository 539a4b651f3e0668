"""Build the documentation as a site: python scripts/build_site.py writes ``site/``.

The pages are those of the repository, laid out as they lie there, so that a link between pages is
right in both places. What a page links to that is no page (a script, a folder of recipes) becomes a
page that shows it, and each room of ``src/orchard`` a page from its docstrings. zensical builds in
strict mode; then every link of the built site is followed, since the site must work from a folder
and fetch nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parent.parent
PAGES, SITE = ROOT / "build" / "pages", ROOT / "site"
IMAGES = (".png", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".json": "json", ".yaml": "yaml"}

_FENCE = re.compile(r"^(```+|~~~+)[^\n]*\n.*?^\1[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\(\s*<?)([^)\s>#]+)((?:#[^)\s>]*)?>?[^)]*\))")


def sources() -> list[Path]:
    """Return the Markdown files that become pages."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [
        *top,
        *sorted(p for room in ("docs", "benchmarks") for p in (ROOT / room).rglob("*.md")),
    ]


def rooms() -> dict[str, list[str]]:
    """Return the pages of the API: the name of a room, and the modules that it shows."""
    package = ROOT / "src" / "orchard"
    top = sorted(path.stem for path in package.glob("[a-z]*.py"))
    found = {"orchard": ["orchard", *(f"orchard.{name}" for name in top)]}
    for init in sorted(package.rglob("__init__.py")):
        parts = init.parent.relative_to(package).parts
        modules = [path for path in init.parent.glob("*.py") if path != init]
        if parts and modules and parts[0] != "flower_bundle":
            found[".".join(parts)] = [".".join(("orchard", *parts))]
    return found


class Pages:
    """Lays out the pages in a folder."""

    def __init__(self, folder: Path) -> None:
        """Remember where the pages go."""
        self._folder = folder
        self._pages = {path.resolve() for path in sources()}
        self._shown: set[Path] = set()

    def write(self) -> None:
        """Write all pages anew."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for path in sources():
            text = path.read_text(encoding="utf-8")
            self._put(self._name(path), self._relinked(path, text))
        for name, modules in rooms().items():
            blocks = "\n\n".join(f"::: {module}" + _alone(name) for module in modules)
            self._put(Path("api") / f"{name}.md", f"# {name}\n\n{blocks}\n")
        self._show(ROOT / "benchmarks")

    def _name(self, path: Path) -> Path:
        relative = path.relative_to(ROOT)
        return Path("index.md") if relative == Path("README.md") else relative

    def _put(self, name: Path, text: str) -> None:
        file = self._folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def _relinked(self, page: Path, text: str) -> str:
        """Return a page whose links lead to pages, code blocks untouched."""
        parts, end = [], 0
        for fence in _FENCE.finditer(text):
            parts += [self._relink(page, text[end : fence.start()]), fence[0]]
            end = fence.end()
        return "".join([*parts, self._relink(page, text[end:])])

    def _relink(self, page: Path, prose: str) -> str:
        def lead(link: re.Match[str]) -> str:
            if re.match(r"[a-z][a-z0-9+.-]*:", link[2]):
                return link[0]
            target = (page.parent / link[2]).resolve()
            here = (self._folder / self._name(page)).parent
            there = self._folder / self._shown_at(target)
            return f"{link[1]}{os.path.relpath(there, here)}{link[3]}"

        return _LINK.sub(lead, prose)

    def _shown_at(self, target: Path) -> Path:
        """Return the page that a path is shown at, and see to it that there is one.

        Raises:
            ValueError: There is no such path in the project.
        """
        if not target.exists() or not target.is_relative_to(ROOT):
            raise ValueError(f"a link must lead to a file of the project, got {target}")
        if target in self._pages:
            return self._name(target)
        relative = target.relative_to(ROOT)
        if target.suffix in IMAGES:
            copy = self._folder / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, copy)
            return relative
        self._show(target)
        return relative / "index.md" if target.is_dir() else Path(f"{relative}.md")

    def _show(self, target: Path) -> None:
        """Write the page of a file that is no page, or of a folder."""
        if target in self._shown:
            return
        self._shown.add(target)
        relative = target.relative_to(ROOT)
        if target.is_dir():
            lines = [f"# {relative}\n"]
            for path in sorted(target.iterdir()):
                entry = path / "README.md" if (path / "README.md") in self._pages else path
                if entry in self._pages or path.is_file():
                    to = os.path.relpath(self._shown_at(entry), relative)
                    lines.append(f"- [{path.name}]({to})")
            self._put(relative / "index.md", "\n".join(lines) + "\n")
            return
        code = target.read_text(encoding="utf-8").rstrip()
        language = LANGUAGES.get(target.suffix, "text")
        self._put(Path(f"{relative}.md"), f"# {relative}\n\n~~~~{language}\n{code}\n~~~~\n")


def _alone(room: str) -> str:
    """Return the options of a module that is shown without those below it."""
    if room != "orchard":
        return ""
    return "\n    options:\n      show_submodules: false"


def missing_in_nav() -> Iterator[str]:
    """Yield pages that the navigation of zensical.toml does not name."""
    config = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))
    named = set(_leaves(config["project"]["nav"]))
    for path in sorted(PAGES.rglob("*.md")):
        name = path.relative_to(PAGES).as_posix()
        own = path.name in ("README.md", "index.md") or not name.startswith("benchmarks/")
        shown = name.startswith(("examples/", "recipes/", "CITATION"))
        if own and not shown and name not in named:
            yield f"zensical.toml must name {name} in nav, got no such entry"


def _leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, list):
        for entry in nav:
            yield from _leaves(entry)
    elif isinstance(nav, dict):
        for entry in nav.values():
            yield from _leaves(entry)


class _Links(HTMLParser):
    """The ids of a built page, where it leads, and what a browser would fetch for it."""

    def __init__(self) -> None:
        """Begin with a page that says nothing."""
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one tag says."""
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in values:
            self.fetched.append(values["src"])
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(values.get("href", ""))


def broken(site: Path) -> Iterator[str]:
    """Yield links of a built site that lead nowhere, and what it would fetch from elsewhere."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.resolve()] = _Links()
        pages[path.resolve()].feed(path.read_text(encoding="utf-8"))
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of a server's root
            continue
        name = path.relative_to(site.resolve())
        for link in page.fetched:
            if urlsplit(link).scheme not in ("", "data") or link.startswith("//"):
                yield f"{name} would fetch {link}"
        for link in (*page.links, *page.fetched):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{name} leads to {link}, which is not there"
            elif (
                url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids
            ):
                yield f"{name} leads to {link}, but there is no such place"


def main() -> None:
    """Build the site; exit 1 with every problem, one a line."""
    Pages(PAGES).write()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if built.returncode:
        sys.exit(f"{built.stdout}{built.stderr}")
    # zensical only prints what the reader of docstrings complains of.
    said = (built.stdout + built.stderr).splitlines()
    found = [*(line for line in said if "griffe" in line), *missing_in_nav(), *broken(SITE)]
    for problem in found:
        print(problem)
    if found:
        sys.exit(f"{len(found)} problems in the site")
    print(f"{sum(1 for _ in SITE.rglob('*.html'))} pages in {SITE.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
