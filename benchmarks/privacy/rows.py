"""Rows of clients that are attacked: of one category each, or of all, with secrets in them.

    python -m benchmarks.privacy.rows ROWS.jsonl

writes all offices' training rows into one file, for studies with many small clients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchard.data import world
from orchard.data.examples import Example
from orchard.seeding import Seeds

KINDS = world.CONVENTIONS + world.NEW_SKILLS
NUM_RIVALS = 63
"""Random secrets that each planted one is ranked among, itself not counted."""
NUM_WORDS = 3
"""Of a secret: 60 words make 205,320 secrets of three different ones."""


@dataclass(frozen=True)
class Canary:
    """A secret.

    Attributes:
        planted: The row that stands in a client's data.
        rivals: The same question with other secrets, none of which is in any data.
        repeats: How often it stands there.
    """

    planted: Example
    rivals: tuple[Example, ...]
    repeats: int


def canaries(seed: int, *, repeats: Sequence[int] = (1, 1, 1, 8, 8, 8)) -> list[Canary]:
    """Draw secrets, each with its rivals."""
    generator = Seeds(seed).generator("canaries")

    def draw() -> str:
        return " ".join(map(str, generator.choice(world.WORDS, NUM_WORDS, replace=False)))

    found = []
    for person, number in zip(world.PEOPLE, repeats, strict=False):
        question = f"State the password of {person}"
        secrets = {draw(): None for _ in range(2 * NUM_RIVALS)}
        rows = [Example(question, secret, category="secret") for secret in secrets]
        found.append(Canary(rows[0], tuple(rows[1 : NUM_RIVALS + 1]), number))
    return found


def of_one_kind(seed: int, *, per_kind: int, num_rows: int) -> dict[str, list[Example]]:
    """Return clients of one category each, ``kind-number``, whose rows nobody else has."""
    offices = world.offices(seed)
    generator = Seeds(seed).generator("clients of a kind")
    clients = {}
    for kind in KINDS:
        rows = [row for office in offices for row in office.train if row.category == kind]
        order = generator.permutation(len(rows))
        for number in range(per_kind):
            own = order[number * num_rows : (number + 1) * num_rows]
            clients[f"{kind}-{number}"] = [rows[index] for index in own]
    return clients


def members(seed: int, *, per_kind: int) -> tuple[dict[str, list[Example]], list[Example]]:
    """Return each office's training rows, and as many rows of harbor that nobody trains on."""
    offices = world.offices(seed)
    chosen, outside = {}, []
    for office in offices:
        own = []
        for kind in KINDS:
            rows = [row for row in office.train if row.category == kind]
            own += rows[:per_kind]
            outside += rows[-per_kind:] if office is offices[0] else []
        chosen[office.name] = own
    return chosen, outside


def write_clients(folder: Path, clients: dict[str, list[Example]]) -> None:
    """Write a file of rows for each client."""
    folder.mkdir(parents=True)
    for name, rows in clients.items():
        write_rows(folder / f"{name}.jsonl", rows)


def write_rows(path: Path, rows: Iterable[Example]) -> None:
    """Write rows, one a line."""
    lines = (
        {"instruction": r.instruction, "response": r.response, "category": r.category} for r in rows
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Write the training rows of all offices, in one order for all."""
    rows = [row for office in world.offices(0) for row in office.train]
    order = np.random.default_rng(0).permutation(len(rows))
    write_rows(Path(sys.argv[1]), [rows[index] for index in order])


if __name__ == "__main__":
    main()
