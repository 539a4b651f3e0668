"""From a recipe's data section to the examples of every client."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchard.data import partition, world
from orchard.data.conventions import convention_name, restate
from orchard.data.datasets import load_pool, read_file, read_folder
from orchard.data.examples import Example, Fields
from orchard.data.partition import DuplicateReport
from orchard.data.reading import Reader, Reading, reading_notes, unread_files
from orchard.data.rows import read_rows
from orchard.data.shots import with_shots
from orchard.data.turns import valid_name
from orchard.hub import spelled_like
from orchard.recipe.options import Recipe
from orchard.recipe.reading import words
from orchard.recipe.run_options import DataOptions
from orchard.seeding import Seeds

WORLD, FACTS = "orchard:world", "orchard:facts"

# How many clients a note names.
_NUM_NAMED = 5


@dataclass(frozen=True)
class Federation:
    """Who holds which examples.

    Attributes:
        train: Client id to training examples.
        test: Client id to held-out examples, which never train.
        duplicates: What stands in more than one place, before any was dropped.
        num_dropped: Training examples that were dropped for it.
        has_central_test: All clients have one and the same test set, one list.
        remarks: What of the data was taken, left out or not read.
    """

    train: Mapping[str, Sequence[Example]]
    test: Mapping[str, Sequence[Example]]
    duplicates: DuplicateReport
    num_dropped: int
    has_central_test: bool = False
    remarks: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Return what a person should know about the data before trusting a result."""
        notes = list(self.remarks)
        if self.num_dropped:
            notes.append(
                f"{self.num_dropped} training examples that also stand in a test split were dropped"
            )
        elif self.duplicates.num_across_splits:
            notes.append(
                f"{self.duplicates.num_across_splits} test examples also stand in a training "
                "split; data.duplicates=drop removes them from training"
            )
        if self.duplicates.num_across_clients:
            notes.append(
                f"{self.duplicates.num_across_clients} training examples stand with several clients"
            )
        return notes


def build_federation(recipe: Recipe) -> Federation:
    """Read the data, give every client its examples, and hold out its test split.

    Raises:
        FileNotFoundError: The data is not there.
        ValueError: It cannot be read, or cannot be divided as asked.
    """
    data, seeds = recipe.data, Seeds(recipe.seed)
    remarks: list[str] = []
    if data.path == WORLD:
        if data.partition != "file":
            raise ValueError(
                f"data.partition must be file with data.path = {WORLD}, got {data.partition}; "
                "its four offices are the clients"
            )
        offices = world.offices(recipe.seed)
        train = {office.name: list(office.train) for office in offices}
        test = {office.name: list(office.test) for office in offices}
    elif data.partition == "file":
        clients = _without_small(_read_clients(data, remarks), data, remarks)
        train, test = _split_each(clients, _test_size(data.test_size), seeds)
    else:
        train, test = _divide(_read_pool(data, remarks), data, seeds, remarks)
    return _finish(recipe, train, test, remarks)


def _finish(
    recipe: Recipe,
    train: dict[str, list[Example]],
    test: dict[str, list[Example]],
    remarks: Sequence[str],
) -> Federation:
    """Find duplicates, drop those that should be, and draw the test examples that are used."""
    data, seeds = recipe.data, Seeds(recipe.seed)
    # One list for all clients is one test set: it counts once.
    first = next(iter(test))
    has_central_test = data.test_per_category > 0 and data.partition != "file"
    splits = {first: test[first]} if has_central_test else test
    for client in train:
        valid_name(client, where="the name of a client")
    held = itertools.chain(*train.values(), *splits.values())
    for category in sorted({example.category for example in held}):
        valid_name(category, where="a category of the data")
    duplicates = partition.find_duplicates(train, splits)
    num_dropped = 0
    if data.duplicates == "drop":
        train, num_dropped = partition.without_duplicates(train, splits)
    if data.validation_size:
        train, splits = _split_each(
            train, _test_size(data.validation_size, "validation_size"), seeds, "validation"
        )
        has_central_test = False
    if data.max_train:
        train = {c: _capped(own, data.max_train, seeds, c) for c, own in train.items()}
    limit = recipe.evaluation.max_examples
    if limit:
        splits = {client: _sample(examples, limit, seeds) for client, examples in splits.items()}
    if recipe.evaluation.shots:
        splits = _with_shots(splits, recipe)
    if has_central_test:
        splits = dict.fromkeys(train, splits[first])
    remarks = list(remarks)
    if data.conventions:
        labels = words(data.labels)
        for place, client in enumerate(train):
            train[client] = restate(train[client], data.conventions, place)
            splits[client] = restate(splits[client], data.conventions, place)
            remarks.append(
                f"{client!r} answers by a convention of its own (data.conventions = "
                f"{data.conventions}): {convention_name(data.conventions, place, labels)}"
            )
        has_central_test = False
    return Federation(train, splits, duplicates, num_dropped, has_central_test, tuple(remarks))


def _with_shots(
    splits: Mapping[str, Sequence[Example]], recipe: Recipe
) -> dict[str, list[Example]]:
    """Return test examples behind those of ``evaluation.shots_path``."""
    number, option = recipe.evaluation.shots, "evaluation.shots_path"
    pool = read_examples(recipe.evaluation.shots_path, recipe.data, option=option).examples
    return {
        client: with_shots(examples, pool, number, of=option) for client, examples in splits.items()
    }


def refuse_conventions(data: DataOptions) -> None:
    """Refuse conventions between sites.

    Raises:
        ValueError: The recipe has one.
    """
    if data.conventions:
        raise ValueError(
            f"data.conventions must be empty between sites, got {data.conventions}; which a client "
            "has follows from its place among all clients, and sites answer as their own rows do"
        )


def build_site(recipe: Recipe, client_id: str) -> Federation:
    """Read the data of one client, ``data.path``, as a federation of that client alone.

    Its examples are split as they are where all clients' files lie in one folder. What stands with
    other clients too is not known here, and ``data.duplicates = drop`` drops from this client what
    stands in its own test split.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It cannot be read, or not be divided as asked.
    """
    data, seeds = recipe.data, Seeds(recipe.seed)
    refuse_conventions(data)
    _require_path(data)
    _require_file(data.path, "data.path")
    reading = _read_file(data.path, data)
    remarks = reading_notes({client_id: reading}, of="data.path")
    num_examples = len(reading.examples)
    if num_examples < data.min_examples:
        raise ValueError(
            f"client {client_id!r} must hold at least {data.min_examples} examples "
            f"(data.min_examples), got {num_examples}; add some, or take no part"
        )
    size = _test_size(data.test_size)
    train, test = _split_each({client_id: reading.examples}, size, seeds)
    return _finish(recipe, train, test, remarks)


@dataclass(frozen=True)
class Elsewhere:
    """What all clients hold beside their own examples.

    Attributes:
        retention: Examples of ``evaluation.retention_path``.
        calibration: Examples of ``strategy.calibration_path``. Of a corpus of plain texts, here and
            there, each is a response to nothing.
        remarks: What of them was taken, left out or not read.
    """

    retention: list[Example]
    calibration: list[Example]
    remarks: tuple[str, ...] = ()


def read_elsewhere(recipe: Recipe) -> Elsewhere:
    """Read what all clients hold: examples of retention and of calibration, where there are some.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: It cannot be read.
    """
    path, remarks = recipe.evaluation.retention_path, list[str]()
    retention = world.facts() if path == FACTS else []
    if path and path != FACTS:
        option = "evaluation.retention_path"
        retention = _read_texts(path, recipe.data, option)
        if retention and "loss" not in words(recipe.evaluation.metrics):
            raise ValueError(
                f"evaluation.metrics must have loss with texts in {option}, got "
                f"{recipe.evaluation.metrics}; a text that asks nothing has no other metric"
            )
        retention = retention or _read_other(path, recipe.data, option, remarks)
    calibration: list[Example] = []
    if recipe.strategy.calibration == "corpus":
        path = recipe.strategy.calibration_path
        calibration = _read_texts(path, recipe.data, "strategy.calibration_path") or _read_other(
            path, recipe.data, "strategy.calibration_path", remarks
        )
    return Elsewhere(retention, calibration, tuple(remarks))


def read_examples(path: str, data: DataOptions, *, option: str) -> Reading:
    """Read one file as a recipe reads its own.

    Args:
        path: Of the file.
        data: Says what its rows are.
        option: What named it, for messages.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It cannot be read, or holds no example.
    """
    _require_file(path, option)
    reading = _read_file(path, data)
    if not reading.examples:
        raise ValueError(f"{option} must hold examples, got none in {path}; add some")
    return reading


def _require_file(path: str, option: str) -> None:
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(
            f"{option} must be a file with examples, got {path} (looked in {Path.cwd()})"
            f"{spelled_like(path)}; check the spelling, or name another"
        )


def _read_texts(path: str, data: DataOptions, option: str) -> list[Example]:
    """Return the texts of a file whose rows have a column ``text`` and no response; else none."""
    _require_file(path, option)
    rows = read_rows(Path(path).expanduser())
    first = next(rows, None)
    if first is None or "text" not in first.columns or data.response in first.columns:
        return []
    if _reader(data).format != "auto":
        return []
    texts = [row.columns.get("text") for row in itertools.chain([first], rows) if not row.error]
    return [Example("", text) for text in texts if isinstance(text, str) and text.strip()]


def _read_other(path: str, data: DataOptions, option: str, remarks: list[str]) -> list[Example]:
    _require_file(path, option)
    reading = _read_file(path, data)
    remarks += reading_notes({option: reading}, of=option)
    return reading.examples


def _sample(examples: Sequence[Example], size: int, seeds: Seeds) -> list[Example]:
    """Draw ``size`` examples in their order; the same ones from lists of equal length."""
    order = seeds.generator("evaluation sample").permutation(len(examples))[:size]
    return [examples[index] for index in sorted(order.tolist())]


def _capped(examples: Sequence[Example], size: int, seeds: Seeds, client_id: str) -> list[Example]:
    """Draw at most ``size`` training rows of a client, in their order."""
    if len(examples) <= size:
        return list(examples)
    order = seeds.generator("training rows", client_id).permutation(len(examples))[:size]
    return [examples[index] for index in sorted(order.tolist())]


def _fields(data: DataOptions) -> Fields:
    return Fields(
        instruction=data.instruction,
        response=data.response,
        context=data.context,
        category=data.category,
        system=data.system,
        history=data.history,
        conversation=data.conversation,
        wording=data.wording,
        labels=words(data.labels),
        options=words(data.options),
        answer=data.answer,  # type: ignore[arg-type]
        letters=data.letters,
    )


def _reader(data: DataOptions) -> Reader:
    return Reader(
        _fields(data),
        format=data.format,  # type: ignore[arg-type]
        bad_rows=data.bad_rows,  # type: ignore[arg-type]
    )


def _read_file(path: str, data: DataOptions) -> Reading:
    return read_file(path, _reader(data))


def _require_path(data: DataOptions) -> None:
    if not data.path:
        raise ValueError(
            "data.path must be given, got nothing; for example "
            "data.path=examples.jsonl on the command line"
        )


def _read_clients(data: DataOptions, remarks: list[str]) -> dict[str, list[Example]]:
    _require_path(data)
    path = Path(data.path).expanduser()
    if "=" in data.path and not path.exists():
        return _read_named(data, remarks)
    if path.is_file():
        raise ValueError(
            "data.path must be a folder with one .jsonl file per client with data.partition = "
            f"file, got the file {data.path}; choose data.partition=iid (data.num_clients clients) "
            "or category (one for each category), or make the folder"
        )
    if not path.exists():
        raise FileNotFoundError(
            "data.path must be a folder with one file for each client with data.partition = file, "
            f"got {data.path}, which is not there (looked in {Path.cwd()})"
            f"{spelled_like(data.path)}; check the spelling, or choose data.partition=iid or "
            "category for one file"
        )
    read = read_folder(path, _reader(data))
    remarks += reading_notes(read.clients, of="data.path")
    remarks += unread_files(read.unread, of="data.path")
    return {client: reading.examples for client, reading in read.clients.items()}


def _read_named(data: DataOptions, remarks: list[str]) -> dict[str, list[Example]]:
    """Read ``client=file,client=file``, clients in the order in which they stand there."""
    read: dict[str, Reading] = {}
    for word in words(data.path):
        client, equals, path = (part.strip() for part in word.partition("="))
        if not (client and equals and path) or client in read:
            why = f"{client!r} twice" if client in read else repr(word)
            raise ValueError(
                "data.path must name each client once, as client=file,client=file, got "
                f"{why}; mend it, or name a folder with one file for each client"
            )
        read[client] = read_examples(path, data, option="data.path")
    remarks += reading_notes(read, of="data.path")
    return {client: reading.examples for client, reading in read.items()}


def _read_pool(data: DataOptions, remarks: list[str]) -> Sequence[Example]:
    _require_path(data)
    reading: Reading = load_pool(
        data.path, _reader(data), split=data.split, subset=data.subset or None
    )
    remarks += reading_notes({data.path: reading}, of="data.path")
    return reading.examples


def _without_small(
    clients: Mapping[str, list[Example]], data: DataOptions, remarks: list[str]
) -> dict[str, list[Example]]:
    """Leave out the clients that hold fewer than ``data.min_examples``, and say so."""
    small = {client: len(own) for client, own in clients.items() if len(own) < data.min_examples}
    if not small:
        return dict(clients)
    if len(small) == len(clients):
        raise ValueError(
            f"data.min_examples must leave a client in, got {data.min_examples}, and the largest "
            f"holds {max(small.values())}; lower it, or data.num_clients"
        )
    named = ", ".join(f"{client!r} ({number})" for client, number in [*small.items()][:_NUM_NAMED])
    more = len(small) - _NUM_NAMED
    remarks.append(
        f"{len(small)} of {len(clients)} clients hold fewer than {data.min_examples} examples "
        f"(data.min_examples) and are left out: {named}{f' and {more} more' if more > 0 else ''}"
    )
    return {client: own for client, own in clients.items() if client not in small}


def _split_each(
    clients: Mapping[str, Sequence[Example]], size: int | float, seeds: Seeds, what: str = "test"
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    train, test = {}, {}
    for client, examples in clients.items():
        train_indices, test_indices = partition.split_test(
            range(len(examples)),
            size,
            seeds.generator(f"{what} split", client),
            client_id=client,
        )
        train[client] = [examples[index] for index in train_indices]
        test[client] = [examples[index] for index in test_indices]
    return train, test


def _divide(
    pool: Sequence[Example], data: DataOptions, seeds: Seeds, remarks: list[str]
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Divide one pool over clients, by the recipe's partition."""
    categories = words(data.categories)
    labels = [example.category for example in pool]
    by_category = bool(categories) or data.partition == "category"
    # A skew of labels means nothing where no example has one.
    if by_category or data.partition.startswith("dirichlet"):
        _check_categories(labels, data, remarks)
    if categories:
        chosen = sorted(
            index
            for indices in partition.by_category(labels, categories).values()
            for index in indices
        )
        pool = [pool[index] for index in chosen]
        labels = [example.category for example in pool]
    elif data.partition == "category":
        categories = tuple(sorted({label for label in labels if label.strip()}))
    central: list[Example] = []
    if data.test_per_category:
        kept, held_out = partition.split_pool(
            labels, data.test_per_category, seeds.generator("central test")
        )
        central = [pool[index] for index in held_out]
        pool = [pool[index] for index in kept]
        labels = [example.category for example in pool]
    clients = _partition(labels, categories, data, seeds)
    held = {client: [pool[index] for index in indices] for client, indices in clients.items()}
    held = _without_small(held, data, remarks)
    if central:
        return held, dict.fromkeys(held, central)
    return _split_each(held, _test_size(data.test_size), seeds)


def _check_categories(labels: Sequence[str], data: DataOptions, remarks: list[str]) -> None:
    """Say how many examples have no category, and what becomes of them.

    Raises:
        ValueError: None has.
    """
    num_without = sum(not label.strip() for label in labels)
    if num_without == len(labels):
        column = f"the column {data.category!r}" if data.category else "no column (data.category)"
        raise ValueError(
            f"data.partition must be iid or file for examples without categories, got "
            f"{data.partition}, and none of {len(labels)} has one in {column}; choose "
            "data.partition=iid (data.num_clients clients, dealt at random) or file (a folder with "
            "one file for each client), drop data.categories, or name the column of the categories "
            "in data.category"
        )
    if num_without:
        is_left_out = bool(data.categories) or data.partition == "category"
        where = "go to no client" if is_left_out else "are divided as if they were of one"
        remarks.append(
            f"{num_without} of {len(labels)} examples have no category "
            f"(data.category = {data.category}) and {where}"
        )


def _partition(
    labels: Sequence[str], categories: Sequence[str], data: DataOptions, seeds: Seeds
) -> partition.Partition:
    generator = seeds.generator("partition")
    if data.partition == "category":
        return partition.by_category(labels, categories)
    if data.partition == "dirichlet":
        return partition.dirichlet(labels, data.num_clients, data.alpha, generator, min_examples=2)
    if data.partition == "dirichlet_resample":
        return partition.dirichlet_resample(
            labels, data.num_clients, data.alpha, data.examples_per_client, generator
        )
    return partition.iid(len(labels), data.num_clients, generator)


def _test_size(size: float, option: str = "test_size") -> int | float:
    if size < 1:
        return size
    if size != int(size):
        raise ValueError(f"data.{option} must be a share below 1 or a whole number, got {size}")
    return int(size)
