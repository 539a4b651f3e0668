"""What evaluation generated, kept by each client for its own eyes.

A file for each round holds a line for every example and model, beside the client's other private
files and readable by its owner alone. Nothing here is ever sent: a coordinator sees means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchard.client.store import ClientStore
from orchard.evaluation.quality import Answer
from orchard.results import write_atomically

FOLDER = "answers"
_OWNER_ALONE = 0o600


def keep_answers(
    store: ClientStore,
    answers: Sequence[Answer],
    *,
    client_id: str,
    round_number: int,
    model: str,
    of: str,
) -> None:
    """Write the answers of one model after a round, in the place of those that are there.

    So a round that is run again leaves each once.

    Args:
        store: Of the client.
        answers: To all examples, in their order.
        client_id: Whose they are.
        round_number: The completed round; 0 = before training.
        model: ``base``, ``global``, ``local`` or ``personal``.
        of: ``test``, ``retention`` or ``others``, what the examples are.
    """
    path = store.folder / FOLDER / f"round_{round_number:06d}.jsonl"
    lines = [line for line in _read(path) if (line["model"], line["of"]) != (model, of)]
    about = {"client": client_id, "round": round_number, "model": model, "of": of}
    lines += [
        {**about, "number": number, **asdict(answer)}
        for number, answer in enumerate(answers, start=1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(path, text.encode(), mode=_OWNER_ALONE)


def read_answers(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield what clients kept in any folder below this one, by client and round: line by line."""
    for path in sorted(folder.rglob(f"{FOLDER}/round_*.jsonl")):
        yield from _read(path)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
