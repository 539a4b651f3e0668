"""Parts of a page that are made from results, between marks, and sentences that must hold.

A page is prose around blocks::

    <!-- made from the results: findings -->
    ...
    <!-- end of findings -->

What stands between is written by the benchmark's own script, never by hand; a test demands that
every page is as its script writes it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

WIDTH = 100
_BLOCK = re.compile(
    r"<!-- made from the results: (?P<name>\w+) -->\n(?P<text>.*?)<!-- end of (?P=name) -->",
    re.DOTALL,
)


@dataclass(frozen=True)
class Page:
    """What a benchmark makes of its results.

    Attributes:
        folder: Of the benchmark.
        blocks: Name to text of the blocks of its README.
        files: Name to content of the files that are made as a whole.
    """

    folder: Path
    blocks: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def readme(self) -> Path:
        """The page."""
        return self.folder / "README.md"

    def contents(self) -> dict[Path, str]:
        """Return every file that is made, as it must be.

        Raises:
            ValueError: The README has other blocks than are made.
        """
        text = self.readme.read_text(encoding="utf-8")
        found = [match["name"] for match in _BLOCK.finditer(text)]
        if sorted(found) != sorted(self.blocks):
            raise ValueError(
                f"blocks of {self.readme} must be {', '.join(sorted(self.blocks))}, got "
                f"{', '.join(sorted(found))}; each once, between its marks"
            )
        made = _BLOCK.sub(lambda match: _block(match["name"], self.blocks[match["name"]]), text)
        files = {self.folder / name: content for name, content in self.files.items()}
        return {self.readme: made, **files}

    def stale(self) -> list[Path]:
        """Return the files that are not as the results make them."""
        return [
            path
            for path, content in self.contents().items()
            if not path.exists() or path.read_text(encoding="utf-8") != content
        ]

    def write(self) -> None:
        """Write what is made."""
        for path, content in self.contents().items():
            path.write_text(content, encoding="utf-8")


def _block(name: str, text: str) -> str:
    return f"<!-- made from the results: {name} -->\n{text.strip()}\n<!-- end of {name} -->"


@dataclass(frozen=True)
class Finding:
    """What results say, in a sentence.

    Attributes:
        text: Markdown, with its figures filled in.
        holds: Whether what it says beside its figures is so in the results.
    """

    text: str
    holds: bool = True


def findings(found: Iterable[Finding]) -> str:
    """Return sentences as a list.

    Raises:
        ValueError: One of them does not hold; results have changed since it was written.
    """
    lines = []
    for own in found:
        if not own.holds:
            raise ValueError(
                f"a finding must hold in the results, got: {own.text}; look at the results, and "
                "write what they say"
            )
        lines.append(_fill(f"- {own.text}"))
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """Return text in lines of a page's width."""
    return "\n".join(map(_fill, text.split("\n")))


def _fill(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def row(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def head(names: Sequence[str], *, num_words: int = 1) -> list[str]:
    """Return the first two lines of a table: columns of words, then columns of numbers."""
    return [row(names), row(["---"] * num_words + ["---:"] * (len(names) - num_words))]


def table(names: Sequence[str], rows: Iterable[Sequence[str]], *, num_words: int = 1) -> str:
    """Return a table."""
    return "\n".join([*head(names, num_words=num_words), *map(row, rows)])
