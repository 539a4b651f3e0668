"""Write the examples of three offices of the invented country, one file for each: its data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from orchard.data import world


def main() -> None:
    """Write into the folder that is named on the command line."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for office in world.offices(0)[:3]:
        lines = [
            json.dumps({"instruction": e.instruction, "response": e.response, "category": ""})
            for e in (*office.train, *office.test)
        ]
        (folder / f"{office.name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
