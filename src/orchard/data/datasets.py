"""Read instruction-following examples from files, folders of clients and the Hugging Face hub.

Every reader checks each row where it enters and says which line or row is wrong. Text is kept as
it stands in the file: nothing is stripped, so a template sees what the owner of the data wrote.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orchard.data.examples import Example as Example
from orchard.data.examples import Fields as Fields
from orchard.data.reading import Reader, Reading, read_source
from orchard.data.rows import SUFFIXES, Row, read_rows
from orchard.hub import cached_copy, can_only_be_path, find_on_hub, spelled_like
from orchard.library_errors import first_line

# A parquet file says the types of its columns itself.
_TEXT_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".parquet")


@dataclass(frozen=True)
class ClientFolder:
    """A folder with one file for each client.

    Attributes:
        clients: Client id to what was read of its file.
        unread: Names of files and folders in it that were not read.
    """

    clients: Mapping[str, Reading]
    unread: tuple[str, ...] = field(default=())


def read_file(path: str | Path, reader: Reader) -> Reading:
    """Read one example from each row of a file: JSON Lines, a JSON array, CSV, TSV or parquet.

    Text is UTF-8, with or without a BOM. Blank lines are skipped. A number is read as its text, as
    it stands in the file; a null context or category is none. What else is not text, where text
    is wanted, is an error.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: ``path`` is a folder.
        ValueError: The file has no example, or is of no known format; or a row is not an object,
            lacks a column, or has an empty instruction or response. The message has the file and
            the line.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise IsADirectoryError(
            f"path must be a file of examples, got the folder {str(path)!r}; "
            "name a file, or read the folder as one file for each client"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"path must be an existing file, got {str(path)!r} (looked in {Path.cwd()})"
            f"{spelled_like(str(path))}; check the spelling and the folder"
        )
    reading = read_source(read_rows(path), reader, where=str(path))
    if not reading.examples:
        raise ValueError(
            f"{path} must have at least one example, got none; write one JSON object a line, or a "
            "row of CSV below the names of the columns"
        )
    return reading


def read_jsonl(path: str | Path, fields: Fields) -> list[Example]:
    """Read a file whose columns are those that ``fields`` names; see ``read_file``."""
    return read_file(path, Reader(fields, format="instruction")).examples


def is_client_folder(path: str | Path) -> bool:
    """Say whether ``path`` is a folder of clients and nothing else: one with .jsonl files.

    A folder that has data in other files alone may be a data set in one of the hub's formats, with
    its splits; ``read_folder`` reads it as clients where it is asked to.
    """
    return Path(path).is_dir() and any(
        file.suffix.lower() == ".jsonl" for file in _client_files(Path(path))
    )


def read_folder(folder: str | Path, reader: Reader) -> ClientFolder:
    """Read a folder with one file for each client.

    The client id is the file's name without what follows the last dot, which must be one of
    ``SUFFIXES``. Clients are in the order of their ids. Hidden files and folders are not looked at;
    other files, and folders, are not read, and named.

    Raises:
        FileNotFoundError: There is no such folder.
        NotADirectoryError: ``folder`` is a file.
        ValueError: No file is data, two have the same client id, a client has no example, or a row
            is wrong as in ``read_file``.
    """
    folder = Path(folder).expanduser()
    if not folder.exists():
        raise FileNotFoundError(
            f"folder must exist, got {str(folder)!r} (looked in {Path.cwd()}); "
            "check the spelling, or make it with one .jsonl file for each client"
        )
    if not folder.is_dir():
        raise NotADirectoryError(
            f"folder must be a folder of one file for each client, got the file {str(folder)!r}; "
            "name the folder it is in"
        )
    files = _client_files(folder)
    if not files:
        raise ValueError(
            f"folder must have at least one .jsonl file, got none in {str(folder)!r}; "
            f"put one file for each client in it ({', '.join(SUFFIXES)})"
        )
    for client_id, times in Counter(path.stem for path in files).items():
        if times > 1:
            names = " and ".join(repr(path.name) for path in files if path.stem == client_id)
            raise ValueError(
                f"every client must have one file, got {names} for {client_id!r}; rename one, or "
                "join them"
            )
    clients: dict[str, Reading] = {}
    for path in files:
        clients[path.stem] = read_source(read_rows(path), reader, where=str(path))
        if not clients[path.stem].examples:
            raise ValueError(
                f"client {path.stem!r} must have at least one example, got none in {path}; "
                "write one JSON object a line, or remove the file"
            )
    others = sorted(
        path.name + ("/" if path.is_dir() else "")
        for path in folder.iterdir()
        if not path.name.startswith(".") and path not in files
    )
    return ClientFolder(clients, tuple(others))


def read_client_folder(folder: str | Path, fields: Fields) -> dict[str, list[Example]]:
    """Read a folder of clients whose columns ``fields`` names; see ``read_folder``."""
    read = read_folder(folder, Reader(fields, format="instruction"))
    return {client_id: reading.examples for client_id, reading in read.clients.items()}


def read_dataset(
    name: str, reader: Reader, *, split: str = "train", subset: str | None = None
) -> Reading:
    """Read a data set of the Hugging Face hub, or a folder in one of its formats.

    Columns of class labels are read as their names, not as their numbers. Files in a folder of
    this machine, and files of text on the hub, are read as ``read_file`` reads them, so that no
    cell changes: the hub's library guesses types of columns. Where the hub cannot be reached, the
    copy in its cache is read.

    Args:
        name: ``owner/name`` on the hub, or a local folder of parquet, CSV or JSON files.
        reader: How rows are read.
        split: The name of the split, with an optional slice such as ``train[:1000]``.
        subset: The configuration, where a data set has several.

    Raises:
        FileNotFoundError: Neither the hub nor this machine has the data set.
        ConnectionError: The hub cannot be reached.
        ValueError: The data set has no such split or subset, no row, or a row is wrong as in
            ``read_file``. The message has the row, counted from 1.
    """
    import datasets

    if not Path(name).is_dir() and not _is_kept(name):
        # One request: the library that reads it tries six times when no hub answers.
        find_on_hub(name, kind="dataset", option="dataset")
    files: Mapping[str, Sequence[str | Path]] | None
    unread: tuple[str, ...] = ()
    try:
        if Path(name).is_dir():
            files, unread = _local_files(name, subset)
        else:
            files = _hub_files(name, subset)
        table = datasets.load_dataset(name, subset, split=split) if files is None else None
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"dataset must be a file, a folder or a dataset on the hub, got {name!r}; "
            f"check the spelling, and log in if it is private ({first_line(error)})"
        ) from error
    except ConnectionError as error:
        copy = None if Path(name).is_dir() else cached_copy(name, kind="dataset")
        if copy is not None:
            return read_dataset(str(copy), reader, split=split, subset=subset)
        raise ConnectionError(
            f"dataset must be at hand or the hub must be reachable, got {name!r}; "
            f"check the network, or name a local file ({first_line(error)})"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"split and subset must be in the dataset {name!r}, got split {split!r} and subset "
            f"{subset!r}; choose others ({first_line(error)})"
        ) from error
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(
            f"dataset must be readable, got {name!r} with an error ({first_line(error)}: "
            f"{first_line(error.__cause__ or error)}); repair its files, or name one of them"
        ) from error
    if files is None:
        rows = _table_rows(table, where=f"{name} ({split})")
    else:
        rows = _split_rows(files, split, name=name)
    reading = read_source(rows, reader, where=f"{name} ({split})")
    if not reading.examples:
        raise ValueError(
            f"dataset {name!r} must have at least one example, got none in split {split!r}; "
            "choose another split"
        )
    others = () if files is None else tuple(part for part in files if part not in split)
    return replace(reading, splits=others, files=unread)


def read_hub(
    name: str, *, split: str = "train", fields: Fields, subset: str | None = None
) -> list[Example]:
    """Read a data set whose columns ``fields`` names; see ``read_dataset``."""
    reader = Reader(fields, format="instruction")
    return read_dataset(name, reader, split=split, subset=subset).examples


def _local_files(
    name: str, subset: str | None
) -> tuple[dict[str, list[Path]] | None, tuple[str, ...]]:
    """Return the files of each split of a local folder, and the names of those of no split.

    None in their place where the hub's library reads them. Of files in several formats that
    library takes those of one.
    """
    import datasets

    builder = datasets.load_dataset_builder(name, subset)
    files = {
        str(split): [Path(file) for file in paths]
        for split, paths in (builder.config.data_files or {}).items()
    }
    every = [file for paths in files.values() for file in paths]
    can_read = all(file.suffix.lower() in SUFFIXES and file.is_file() for file in every)
    folder, taken = Path(name), {os.path.realpath(file) for file in every}
    others = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name != "README.md"  # the card, which is read
        and os.path.realpath(path) not in taken
    )
    is_ours = bool(every) and can_read and not _has_labels(builder)
    return files if is_ours else None, tuple(others)


def _hub_files(name: str, subset: str | None) -> dict[str, list[str]] | None:
    """Return where the files of each split lie on the hub; None unless all of them are text."""
    import datasets

    builder = datasets.load_dataset_builder(name, subset)
    files = {
        str(split): [str(file) for file in paths]
        for split, paths in (builder.config.data_files or {}).items()
    }
    every = [file for paths in files.values() for file in paths]
    is_text = all(
        file.startswith("hf://") and Path(file).suffix.lower() in _TEXT_SUFFIXES for file in every
    )
    return files if every and is_text and not _has_labels(builder) else None


def _is_kept(name: str) -> bool:
    """Say whether something of a name's owner may be in a cache, which is read without a hub."""
    import datasets

    owner = name.partition("/")[0]
    kept = Path(datasets.config.HF_DATASETS_CACHE).glob(f"{glob.escape(owner)}*")
    return any(kept) or cached_copy(name, kind="dataset") is not None


def _has_labels(builder: Any) -> bool:
    """Say whether a card beside the files says that a column holds class labels."""
    import datasets

    features = (builder.info.features or {}).values()
    return any(isinstance(feature, datasets.ClassLabel) for feature in features)


def _split_rows(
    files: Mapping[str, Sequence[str | Path]], spec: str, *, name: str
) -> Iterator[Row]:
    """Yield the rows of a split, or of slices of several."""
    import datasets

    rows: dict[str, list[Row]] = {}
    for split, paths in files.items():
        own = [_at_hand(path) for path in paths] if split in spec else []
        rows[split] = [row for path in own for row in read_rows(path)]
    try:
        wanted = datasets.ReadInstruction.from_spec(spec)
        parts = wanted.to_absolute({split: len(found) for split, found in rows.items()})
    except ValueError as error:
        raise ValueError(
            f"split and subset must be in the dataset {name!r}, got split {spec!r}; choose one of "
            f"{', '.join(map(repr, files))} ({first_line(error)})"
        ) from error
    return (row for part in parts for row in rows[part.splitname][part.from_ : part.to])


def _at_hand(place: str | Path) -> Path:
    """Return a file, after downloading it where it lies on the hub."""
    import datasets

    if isinstance(place, Path):
        return place
    return Path(datasets.DownloadManager().download(place))


def _table_rows(table: Any, *, where: str) -> Iterator[Row]:
    import datasets

    label_names = {
        column: feature.names
        for column, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(table, start=1):
        for column, names in label_names.items():
            # -1 is the hub's mark for a row without a label.
            row[column] = names[row[column]] if row[column] not in (None, -1) else None
        yield Row(f"row {number} of {where}", row)


def load_pool(
    path: str, reader: Reader, *, split: str = "train", subset: str | None = None
) -> Reading:
    """Read one pool of examples from wherever ``path`` points.

    An existing file is read by ``read_file``, an existing folder as a data set in one of the hub's
    formats. What does not exist is a missing file when it looks like a path (it ends in one of
    ``SUFFIXES``, begins with ``.``, ``/`` or ``~``, or has more parts than ``owner/name``), else a
    name on the hub. ``split`` and ``subset`` count for folders and the hub only.

    Raises:
        FileNotFoundError: ``path`` looks like a path and does not exist, or the hub lacks it.
        ConnectionError: The hub cannot be reached.
        ValueError: ``path`` is a folder of clients (see ``is_client_folder``), which is no single
            pool; or the data is wrong as in ``read_file`` and ``read_dataset``.
    """
    local = Path(path).expanduser()
    if is_client_folder(local):
        raise ValueError(
            f"path must be one pool of examples, got the folder of clients {path!r}; read it as "
            "one client for each file (data.partition=file), or name one of its files"
        )
    if local.is_dir():
        return read_dataset(str(local), reader, split=split, subset=subset)
    if local.is_file() or path.lower().endswith(SUFFIXES) or can_only_be_path(path):
        return read_file(local, reader)
    return read_dataset(path, reader, split=split, subset=subset)


def load_examples(
    path: str, fields: Fields, *, split: str = "train", subset: str | None = None
) -> list[Example]:
    """Read a pool whose columns ``fields`` names; see ``load_pool``."""
    reader = Reader(fields, format="instruction")
    return load_pool(path, reader, split=split, subset=subset).examples


def content_hash(example: Example) -> str:
    """Return 64 hexadecimal digits that two examples share when they say the same.

    Case, the amount of white space and the border between instruction and context do not count
    (templates join the two by a space); the category does not either. What was said before does.
    """
    prompt = _normalize(f"{example.instruction} {example.context}")
    before = "".join(f"{turn.role}\x1e{_normalize(turn.text)}\x1f" for turn in example.history)
    said = f"{before}{prompt}\x1f{_normalize(example.response)}"
    return hashlib.sha256(said.encode()).hexdigest()


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())


def _client_files(folder: Path) -> list[Path]:
    return sorted(
        (
            path
            for path in folder.iterdir()
            if path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        ),
        key=lambda path: (path.stem, path.suffix),
    )
