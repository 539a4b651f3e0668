"""The server's state, and how it survives a crash.

A checkpoint is a folder ``round_000007`` with one safetensors file per tree. Arrays are written
first, ``state.json`` with their digests last, each flushed and renamed: a folder without a state
file, or with arrays that differ from it, is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from orchard.results import write_atomically, write_json
from orchard.server.optimizers import Slots
from orchard.trees import Tree


@dataclass(frozen=True)
class ServerState:
    """What the server holds between rounds.

    Attributes:
        round_number: The last completed round; 0 before training.
        shared: The global tree, float32.
        slots: The server optimizer's trees.
        held: The global tree as the clients of the last round have it, where later rounds are sent
            as differences to it; empty where they are not.
        holders: These clients.
    """

    round_number: int
    shared: Tree
    slots: Slots = field(default_factory=dict)
    held: Tree = field(default_factory=dict)
    holders: tuple[str, ...] = ()


_HELD = "held_by_clients"  # beside the names of slots


def _folder_name(round_number: int) -> str:
    return f"round_{round_number:06d}"


def save_checkpoint(
    folder: Path, state: ServerState, *, about: Mapping[str, Any], keep: int = 0
) -> Path:
    """Write ``state`` below ``folder`` and drop all but this and the previous checkpoint.

    Args:
        folder: The run's checkpoint folder.
        state: What to save.
        about: JSON values that must be the same when the run is resumed, such as the digest of
            the base.
        keep: So many checkpoints stay, and two at least.

    Returns:
        The checkpoint's own folder.
    """
    target = folder / _folder_name(state.round_number)
    digests = {}
    trees = {"shared": state.shared, **state.slots, **({_HELD: state.held} if state.held else {})}
    for name, tree in trees.items():
        content = save({key: tensor.contiguous() for key, tensor in tree.items()})
        digests[name] = hashlib.sha256(content).hexdigest()
        write_atomically(target / f"{name}.safetensors", content)
    write_json(
        target / "state.json",
        {
            "round_number": state.round_number,
            "trees": digests,
            "holders": state.holders,
            "about": dict(about),
        },
    )
    # Later folders can only be damaged ones, that loading skipped: they count for nothing.
    earlier = [path for path in sorted(folder.glob("round_*")) if path.name < target.name]
    for old in earlier[: -max(1, keep - 1)]:
        shutil.rmtree(old)
    return target


def newest_round(folder: Path) -> int:
    """Return the round of the newest checkpoint below ``folder``, without reading it; 0 = none."""
    found = (path.parent.name for path in folder.glob("round_*/state.json"))
    return max((int(name.removeprefix("round_")) for name in found), default=0)


def load_checkpoint(folder: Path, *, about: Mapping[str, Any]) -> ServerState | None:
    """Return the newest complete checkpoint below ``folder``, or None where there is none.

    Raises:
        ValueError: The checkpoint was made under another ``about``.
    """
    for candidate in sorted(folder.glob("round_*"), reverse=True):
        try:
            saved = json.loads((candidate / "state.json").read_text())
            trees = {}
            for name, digest in saved["trees"].items():
                content = (candidate / f"{name}.safetensors").read_bytes()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise FileNotFoundError(name)
                trees[name] = load(content)
        except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError):
            continue
        for key, value in about.items():
            if saved["about"].get(key) != value:
                raise ValueError(
                    f"{key} must be {saved['about'].get(key)} to resume from {candidate.name}, "
                    f"got {value}; use the same recipe and base, or another --out"
                )
        return ServerState(
            saved["round_number"],
            trees.pop("shared"),
            held=trees.pop(_HELD, {}),
            slots=trees,
            holders=tuple(saved.get("holders", ())),
        )
    return None
