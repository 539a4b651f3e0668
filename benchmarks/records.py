"""What a result is kept with: source, recipe, data, versions, machine; or that it is unknown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]

MEASURED = ("commit", "versions", "hardware")
"""What every result says of itself."""
OF_A_RECIPE = ("recipe_digest", "data_digest")
"""What the result of a recipe says besides."""
MARKS = ("unknown: ", "partly unknown: ")


def origin(result: Mapping[str, Any]) -> Record:
    """Return what a kept result takes over of a run's ``result.json``."""
    return {key: result[key] for key in (*MEASURED, *OF_A_RECIPE) if key in result}


def lacks(record: Mapping[str, Any], *, has_recipe: bool) -> list[str]:
    """Return which parts of its origin a record does not say."""
    needed = (*MEASURED, *OF_A_RECIPE) if has_recipe else MEASURED
    missing = [key for key in needed if not record.get(key)]
    hardware = record.get("hardware") or {}
    if "hardware" not in missing and not {"cpu", "cpu_features"} <= hardware.keys():
        missing.append("hardware.cpu_features")
    return missing


def is_marked(record: Mapping[str, Any]) -> bool:
    """Say whether a record says that its origin is not known, or not all of it."""
    return str(record.get("provenance", "")).startswith(MARKS)


def read(folder: Path, pattern: str = "*.json") -> list[Record]:
    """Return the records of a folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def keep(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def origins(records: Iterable[Mapping[str, Any]]) -> str:
    """Return a sentence for each origin that records have, and how many have it."""
    found = Counter(_origin(record) for record in records)
    total = sum(found.values())
    if len(found) == 1:
        return f"Origin of the results: {next(iter(found))}."
    return "\n".join(
        f"- Origin of {count} of {total} results: {text}." for text, count in found.items()
    )


def _origin(record: Mapping[str, Any]) -> str:
    parts = []
    if commit := record.get("commit"):
        name, _, changes = str(commit).partition("+")
        parts.append(f"commit {name[:12]}{' with changes' if changes else ''}")
    hardware = record.get("hardware") or {}
    if hardware:
        parts.append(machine(hardware))
    if torch := (record.get("versions") or {}).get("torch"):
        parts.append(f"torch {torch}")
    if mark := record.get("provenance"):
        parts.append(str(mark))
    return "; ".join(parts)


def machine(hardware: Mapping[str, Any]) -> str:
    """Return a machine in words: its CPU, how many there are, and the instruction sets known of."""
    number = hardware.get("num_cpus")
    features: Sequence[str] | None = hardware.get("cpu_features")
    parts = [
        str(hardware.get("cpu") or f"{hardware.get('machine', 'a machine')}, name unknown"),
        f"{number} CPU{'' if number == 1 else 's'}" if number else "",
        "" if features is None else ", ".join(features) or "none of the instruction sets listed",
        str(hardware.get("note", "")),
    ]
    return ", ".join(part for part in parts if part)
