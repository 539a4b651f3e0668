"""Read instruction-following examples from files, folders of clients and the Hugging Face hub.

Every reader checks each row where it enters and says which line or row is wrong. Text is kept as
it stands in the file: nothing is stripped, so a template sees what the owner of the data wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchard.data.examples import Example as Example
from orchard.data.examples import Fields as Fields
from orchard.data.examples import example_from_row, shorten


def read_jsonl(path: str | Path, fields: Fields) -> list[Example]:
    """Read one example from each line of a JSON Lines file (UTF-8, with or without a BOM).

    Blank lines are skipped. A number is read as its text (``42`` as ``"42"``, so that numeric
    answers and labels work); a null context or category is none. Everything else that is not
    text (lists such as chat messages, objects, booleans) is an error.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: ``path`` is a folder.
        ValueError: The file has no example; or a line is not a JSON object, lacks a column, or has
            an empty instruction or response. The message has the file and the line.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"path must be a JSON Lines file, got the folder {str(path)!r}; "
            "name a file, or read the folder as one file for each client"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"path must be an existing file, got {str(path)!r} (looked in {Path.cwd()}); "
            "check the spelling and the folder"
        )
    examples = [
        example_from_row(row, fields=fields, where=where) for where, row in _json_rows(path)
    ]
    if not examples:
        raise ValueError(
            f"{path} must have at least one example, got none; write one JSON object a line"
        )
    return examples


def is_client_folder(path: str | Path) -> bool:
    """Say whether ``path`` is a folder that ``read_client_folder`` reads: one with .jsonl files."""
    return Path(path).is_dir() and bool(_client_files(Path(path)))


def read_client_folder(folder: str | Path, fields: Fields) -> dict[str, list[Example]]:
    """Read a folder with one .jsonl file for each client.

    The client id is the file name without .jsonl. Clients are in the order of their ids; hidden
    files, subfolders and other files are not read.

    Raises:
        FileNotFoundError: There is no such folder.
        NotADirectoryError: ``folder`` is a file.
        ValueError: No file ends in .jsonl, a client has no example, or a line is wrong as in
            ``read_jsonl``.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(
            f"folder must exist, got {str(folder)!r} (looked in {Path.cwd()}); "
            "check the spelling, or make it with one .jsonl file for each client"
        )
    if not folder.is_dir():
        raise NotADirectoryError(
            f"folder must be a folder of .jsonl files, got the file {str(folder)!r}; "
            "name the folder it is in"
        )
    files = _client_files(folder)
    if not files:
        raise ValueError(
            f"folder must have at least one .jsonl file, got none in {str(folder)!r}; "
            "put one file for each client in it"
        )
    clients: dict[str, list[Example]] = {}
    for path in files:
        examples = [
            example_from_row(row, fields=fields, where=where) for where, row in _json_rows(path)
        ]
        if not examples:
            raise ValueError(
                f"client {path.stem!r} must have at least one example, got none in {path}; "
                "write one JSON object a line, or remove the file"
            )
        clients[path.stem] = examples
    return clients


def read_hub(
    name: str, *, split: str = "train", fields: Fields, subset: str | None = None
) -> list[Example]:
    """Read a data set of the Hugging Face hub, or a folder in one of its formats.

    Columns of class labels are read as their names, not as their numbers.

    Args:
        name: ``owner/name`` on the hub, or a local folder of parquet, CSV or JSON files.
        split: The name of the split, with an optional slice such as ``train[:1000]``.
        fields: Which column holds what.
        subset: The configuration, where a data set has several.

    Raises:
        FileNotFoundError: Neither the hub nor this machine has the data set.
        ConnectionError: The hub cannot be reached.
        ValueError: The data set has no such split or subset, no row, or a row is wrong as in
            ``read_jsonl``. The message has the row, counted from 1.
    """
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"dataset must be a file, a folder or a dataset on the hub, got {name!r}; "
            f"check the spelling, and log in if it is private ({_first_line(error)})"
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"dataset must be at hand or the hub must be reachable, got {name!r}; "
            f"check the network, or name a local file ({_first_line(error)})"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"split and subset must be in the dataset {name!r}, got split {split!r} and subset "
            f"{subset!r}; choose others ({_first_line(error)})"
        ) from error
    label_names = {
        column: feature.names
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    examples = []
    for number, row in enumerate(table, start=1):
        for column, names in label_names.items():
            # -1 is the hub's mark for a row without a label.
            row[column] = names[row[column]] if row[column] not in (None, -1) else None
        examples.append(
            example_from_row(row, fields=fields, where=f"row {number} of {name} ({split})")
        )
    if not examples:
        raise ValueError(
            f"dataset {name!r} must have at least one example, got none in split {split!r}; "
            "choose another split"
        )
    return examples


def load_examples(
    path: str, fields: Fields, *, split: str = "train", subset: str | None = None
) -> list[Example]:
    """Read one pool of examples from wherever ``path`` points.

    An existing file is read as JSON Lines, an existing folder as a data set in one of the hub's
    formats. What does not exist is a missing file when it looks like a path (it ends in .jsonl,
    begins with ``.``, ``/`` or ``~``, or has more parts than ``owner/name``), else a name on the
    hub. ``split`` and ``subset`` count for folders and the hub only.

    Raises:
        FileNotFoundError: ``path`` looks like a path and does not exist, or the hub lacks it.
        ConnectionError: The hub cannot be reached.
        ValueError: ``path`` is a folder of clients (see ``is_client_folder``), which is no single
            pool; or the data is wrong as in ``read_jsonl`` and ``read_hub``.
    """
    local = Path(path).expanduser()
    if is_client_folder(local):
        raise ValueError(
            f"path must be one pool of examples, got the folder of clients {path!r}; "
            "read it as one client for each file, or name one of its files"
        )
    if local.is_file():
        return read_jsonl(local, fields)
    if local.is_dir():
        return read_hub(str(local), split=split, fields=fields, subset=subset)
    if _looks_like_path(path):
        return read_jsonl(local, fields)
    return read_hub(path, split=split, fields=fields, subset=subset)


def content_hash(example: Example) -> str:
    """Return 64 hexadecimal digits that two examples share when they say the same.

    Case, the amount of white space and the border between instruction and context do not count
    (templates join the two by a space); the category does not either. What was said before does.
    """
    prompt = _normalize(f"{example.instruction} {example.context}")
    before = "".join(f"{turn.role}\x1e{_normalize(turn.text)}\x1f" for turn in example.history)
    text = f"{before}{prompt}\x1f{_normalize(example.response)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _looks_like_path(path: str) -> bool:
    separators = {os.sep, "/"}
    return (
        path.endswith(".jsonl")
        or path.startswith((".", "~", *separators))
        or max(path.count(separator) for separator in separators) > 1
    )


def _client_files(folder: Path) -> list[Path]:
    return sorted(
        (p for p in folder.glob("*.jsonl") if p.is_file() and not p.name.startswith(".")),
        key=lambda path: path.stem,
    )


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Yield where each row stands, for messages, and the row."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"line {number} of {path}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where} must be UTF-8 text, got the byte 0x{line[error.start]:02x}; "
                    "save the file as JSON Lines in UTF-8"
                ) from error
            if not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{where} must be one JSON object, got {shorten(text)} ({error}); "
                    "write every example on a line of its own"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{where} must be one JSON object, got {shorten(text)}; "
                    'write {"instruction": ..., "response": ...}'
                )
            yield where, row
