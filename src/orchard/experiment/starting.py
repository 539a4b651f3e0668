"""How a run was started, as far as its recipe does not say, so that it can go on by itself."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from orchard.results import write_json

START_FILE = "start.json"


@dataclass(frozen=True)
class Start:
    """What a command was told, and where.

    Attributes:
        directory: The working folder, from which relative paths of the recipe are meant and
            methods of one's own are found.
        track: Names of trackers.
        address: ``host:port`` of a coordinator; empty for a run of the simulator.
        keys: A coordinator's folder of keys; empty = without TLS.
        is_insecure: Whether a coordinator was to cross a network without keys.
        workers: How many processes compute the clients of the simulator.
        ray: Address of the Ray cluster that they are on; empty = this machine.
    """

    directory: str
    track: tuple[str, ...] = ()
    address: str = ""
    keys: str = ""
    is_insecure: bool = False
    workers: int = 1
    ray: str = ""


def record_start(folder: Path, start: Start) -> None:
    """Write down in a run's folder how it was started, or was last."""
    write_json(folder / START_FILE, asdict(start))


def read_start(folder: Path) -> Start | None:
    """Return how the run in a folder was started; None where nobody wrote it down.

    Raises:
        ValueError: The file is none of ours.
    """
    path = folder / START_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Start(**{**found, "track": tuple(found["track"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{START_FILE} must be as Orchard wrote it, got {path} with: {error}; remove it, and "
            "start from the folder where the run was started"
        ) from error
