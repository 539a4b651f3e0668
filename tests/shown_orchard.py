"""The ``orchard`` of a shown block: as typed, on the tiny model, with few and short rounds."""

from __future__ import annotations

import sys

from orchard.cli import main

# What stands for a reader's own model, and what makes a run short where the block does not say it.
TINY = {"MODEL": "orchard:tiny"}
SHORT = (
    *("server.rounds=2", "client.steps=2", "evaluation.max_examples=2"),
    "evaluation.retention_path=",
)
SHORT_ANSWERS = "evaluation.max_new_tokens=4"


def shortened(arguments: list[str]) -> list[str]:
    """Return the arguments of a command that is to take seconds."""
    replaced = []
    for argument in arguments:
        key, separator, value = argument.rpartition("=")
        replaced.append(f"{key}{separator}{TINY.get(value, value)}")
    if replaced[:1] != ["run"]:
        return replaced
    given = {argument.partition("=")[0] for argument in replaced}
    wanted = [*SHORT, SHORT_ANSWERS]
    return [*replaced, *(w for w in wanted if w.partition("=")[0] not in given)]


if __name__ == "__main__":
    sys.argv[1:] = shortened(sys.argv[1:])
    main()
