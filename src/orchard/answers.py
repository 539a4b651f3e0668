"""What models answered, beside what was right: read from what clients kept of a run."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from orchard.client.answers import read_answers
from orchard.evaluation.quality import TESTED_ON
from orchard.reports import format_score

Line: TypeAlias = Mapping[str, Any]
"""One answer, as ``client.answers`` writes it."""

_MODELS = ("base", "global", "local", "personal")
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the order of what follows
_LONGEST_PROMPT = 400  # characters that are shown of a prompt: its end, where the question is


def find_answers(
    folder: Path, *, client: str | None = None, round_number: int | None = None
) -> list[Line]:
    """Return the answers of one round, and those of the base, in order of clients and examples.

    Args:
        folder: Of a run, or of a site.
        client: Of whom; None = all.
        round_number: After which round; None = for each client the last that has any.

    Raises:
        FileNotFoundError: There are no answers.
        ValueError: There are none of that client, or of that round.
    """
    every = list(read_answers(folder))
    if not every:
        raise FileNotFoundError(
            f"run must be a folder with answers, got {folder}; evaluate rouge_l, chrf, "
            "exact_match or last_number with evaluation.keep_answers = true; a site that is "
            "started with --keep-answers has them in its own --store"
        )
    clients = sorted({line["client"] for line in every})
    if client is not None and client not in clients:
        raise ValueError(f"--client must be of {', '.join(clients)}, got {client}")
    lines = [line for line in every if client in (None, line["client"])]
    rounds = sorted({line["round"] for line in lines})
    if round_number is not None and round_number not in rounds:
        raise ValueError(f"--round must be of {', '.join(map(str, rounds))}, got {round_number}")
    last: dict[str, int] = {}
    for line in lines:
        last[line["client"]] = max(last.get(line["client"], 0), line["round"])
    chosen = [
        line
        for line in lines
        if line["model"] == "base"
        or line["round"] == (last[line["client"]] if round_number is None else round_number)
    ]
    return sorted(chosen, key=lambda line: (*_example(line), _MODELS.index(line["model"])))


def _example(line: Line) -> tuple[str, int, int]:
    return line["client"], list(TESTED_ON).index(line["of"]), line["number"]


def answers_as_json(lines: Sequence[Line]) -> str:
    """Return answers for programs: a list of objects."""
    return json.dumps(lines, indent=1, ensure_ascii=False)


def print_answers(lines: Iterable[Line], console: Console) -> None:
    """Print each example with its answers below each other, whatever the width."""
    for _, grouped in itertools.groupby(lines, key=_example):
        own = list(grouped)
        first = own[0]
        about = f"{first['client']}, {first['of']} example {first['number']}"
        console.print(Text(_printable(about), style="bold"))
        _print(console, "asked", first["prompt"][-_LONGEST_PROMPT:].strip(), style="dim")
        _print(console, "right", first["reference"])
        for line in own:
            scores = ", ".join(f"{m} {format_score(v, m)}" for m, v in line["scores"].items())
            _print(console, f"{line['model']}, round {line['round']}: {scores}", line["answer"])
        console.print()


def _print(console: Console, about: str, text: str, *, style: str = "") -> None:
    console.print(Padding(Text(about, style="italic"), (0, 0, 0, 2)))
    console.print(Padding(Text(_printable(text) or "(empty)", style=style), (0, 0, 0, 4)))


def _printable(text: str) -> str:
    """Return text that a terminal shows and does not obey: what controls it stands as its code."""
    return "".join(
        f"\\x{ord(sign):02x}"
        if (unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t") or sign in _TURNING
        else sign
        for sign in text
    )
