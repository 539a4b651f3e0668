"""A conversation with a model, line by line: in a terminal, or through a pipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from orchard.data.examples import Turn
from orchard.personal.opening import OpenedModel

RESET, QUIT = "/reset", "/quit"


def chat(model: OpenedModel, lines: Iterable[str], out: TextIO, **options: Any) -> int:
    """Answer line after line, each with what was said before, until ``/quit`` or the end.

    What cannot be answered is said, and the conversation goes on as if it had not been asked.

    Args:
        model: Who answers.
        lines: What is said to it; ``/reset`` forgets what was said.
        out: Where answers go, as they are written.
        options: Of ``OpenedModel.stream``.

    Returns:
        How many lines were answered.
    """
    history: list[Turn] = []
    num_answered = 0
    for line in lines:
        said = line.strip()
        if said == QUIT:
            break
        if said == RESET:
            history = []
            print("(forgotten)", file=out, flush=True)
            continue
        if not said:
            continue
        pieces = []
        try:
            for piece in model.stream(said, history=history, **options):
                pieces.append(piece)
                print(piece, end="", file=out, flush=True)
        except ValueError as error:
            print(f"error: {error}", file=out, flush=True)
            continue
        print(file=out, flush=True)
        answer = "".join(pieces).strip()
        history += [Turn("user", said), Turn("assistant", answer)]
        num_answered += 1
    return num_answered
