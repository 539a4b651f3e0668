"""Partition examples among clients, and hold out test examples.

Everything works on labels and indices and draws from the generator it is given: the same
generator state gives the same partition. Indices of a client are in ascending order, except where
they are drawn with replacement.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from orchard.data.datasets import content_hash
from orchard.data.examples import Example

# Client id -> indices into the pool.
Partition: TypeAlias = dict[str, list[int]]

# A redraw costs microseconds. Where a thousand do not give every client its examples, the
# settings contradict each other and more patience would not help.
_MAX_DRAWS = 1000

# How many duplicates a report shows.
_NUM_SHOWN = 5


def iid(num_examples: int, num_clients: int, generator: np.random.Generator) -> Partition:
    """Deal the examples evenly and at random; the first clients get the remainder.

    Raises:
        ValueError: ``num_clients`` is not in 1..``num_examples``.
    """
    _check_num_clients(num_clients, num_examples=num_examples)
    parts = np.array_split(generator.permutation(num_examples), num_clients)
    return {
        client_id: sorted(part.tolist())
        for client_id, part in zip(_client_ids(num_clients), parts, strict=True)
    }


def dirichlet(
    labels: Sequence[str],
    num_clients: int,
    alpha: float,
    generator: np.random.Generator,
    *,
    min_examples: int = 1,
) -> Partition:
    """Partition with label skew: the shares of each label over the clients follow Dir(alpha).

    Disjoint and complete. A draw that leaves a client fewer than ``min_examples`` is drawn again,
    up to 1000 times, so the shares follow the Dirichlet distribution given that no client starves.

    Source: Yurochkin et al., 2019, arXiv:1905.12022, section 4; the redraw is ours.

    Args:
        labels: The label of each example.
        num_clients: In 1..number of examples.
        alpha: Concentration, > 0; small = each label sits with few clients, large = even.
        generator: Where the draws come from.
        min_examples: The least that every client must hold.

    Raises:
        ValueError: A setting is out of range, or no draw gave every client ``min_examples``.
    """
    _check_num_clients(num_clients, num_examples=len(labels))
    _check_alpha(alpha)
    if not 0 <= min_examples <= len(labels) // num_clients:
        raise ValueError(
            f"min_examples must be in 0..{len(labels) // num_clients} (examples per client), got "
            f"{min_examples}; lower it or choose fewer clients"
        )
    codes, names = _label_codes(labels)
    num_per_label = np.bincount(codes, minlength=len(names))
    for _ in range(_MAX_DRAWS):
        shares = generator.dirichlet(np.full(num_clients, alpha), size=len(names))
        bounds = np.rint(np.cumsum(shares, axis=1) * num_per_label[:, None]).astype(np.int64)
        counts = np.diff(bounds, axis=1, prepend=0)
        if counts.sum(axis=0).min() >= min_examples:
            break
    else:
        raise ValueError(
            f"alpha must let each of {num_clients} clients hold {min_examples} or more of "
            f"{len(labels)} examples, got {alpha} and no such draw in {_MAX_DRAWS}; raise alpha, "
            "lower num_clients or lower min_examples"
        )
    client_ids = _client_ids(num_clients)
    clients: Partition = {client_id: [] for client_id in client_ids}
    for code in range(len(names)):
        shuffled = generator.permutation(np.flatnonzero(codes == code))
        parts = np.split(shuffled, bounds[code, :-1])
        for client_id, part in zip(client_ids, parts, strict=True):
            clients[client_id].extend(part.tolist())
    return {client_id: sorted(indices) for client_id, indices in clients.items()}


def dirichlet_resample(
    labels: Sequence[str],
    num_clients: int,
    alpha: float,
    examples_per_client: int,
    generator: np.random.Generator,
) -> Partition:
    """Draw each client's examples with replacement, in proportion to Dir(alpha) of their label.

    The weight belongs to the example, not to the label, so a large category also counts for more.
    Clients overlap, and a client may hold an example several times. Indices are in the order
    drawn.

    Source: FLEx (Liu et al., 2025, arXiv:2506.00965), Dirichlet setting: 10 clients of 1000.

    Raises:
        ValueError: A setting is out of range.
    """
    _check_num_clients(num_clients, num_examples=len(labels))
    _check_alpha(alpha)
    if examples_per_client < 1:
        raise ValueError(
            f"examples_per_client must be at least 1, got {examples_per_client}; raise it"
        )
    codes, names = _label_codes(labels)
    clients: Partition = {}
    for client_id in _client_ids(num_clients):
        weights = generator.dirichlet(np.full(len(names), alpha))[codes]
        drawn = generator.choice(len(labels), size=examples_per_client, p=weights / weights.sum())
        clients[client_id] = drawn.tolist()
    return clients


def by_category(labels: Sequence[str], categories: Sequence[str]) -> Partition:
    """Give each category to one client, in the order given; the client id is the category.

    Examples of other categories go to nobody.

    Source: FLEx (Liu et al., 2025, arXiv:2506.00965), pathological setting.

    Raises:
        ValueError: No category is given, one is given twice, or one does not exist.
    """
    if not categories:
        raise ValueError("categories must name at least one category, got none; name some")
    for category, times in Counter(categories).items():
        if times > 1:
            raise ValueError(
                f"categories must differ, got {category!r} {times} times; name each once"
            )
    clients: Partition = {category: [] for category in categories}
    for index, label in enumerate(labels):
        if label in clients:
            clients[label].append(index)
    for category, indices in clients.items():
        if not indices:
            existing = sorted(set(labels))
            nearest = difflib.get_close_matches(category, existing, n=1, cutoff=0.0)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "the data set is empty"
            raise ValueError(
                f"categories must be among {', '.join(map(repr, existing))}, got {category!r}; "
                f"{hint}"
            )
    return clients


def split_test(
    indices: Sequence[int],
    test_size: int | float,
    generator: np.random.Generator,
    *,
    client_id: str = "",
) -> tuple[list[int], list[int]]:
    """Hold out a random part of one client's examples for testing.

    An index that stands several times (drawn with replacement) goes to one side with all its
    copies, so no example is on both sides; the test split then has it once.

    Args:
        indices: The client's examples.
        test_size: A whole number of different examples (int), or their share in [0, 1) (float),
            rounded to the nearest whole number.
        generator: Where the draw comes from.
        client_id: The name used in messages.

    Returns:
        The indices for training, in their order, and those for testing, ascending.

    Raises:
        ValueError: ``test_size`` is negative or a share of 1 or more, a share above 0 rounds to no
            example, or nothing is left to train on.
    """
    whose = f"client {client_id!r}" if client_id else "a client"
    distinct = np.unique(np.asarray(indices, dtype=np.int64))
    if isinstance(test_size, float):
        if not 0 <= test_size < 1:
            raise ValueError(
                f"test_size must be a share in [0, 1) or a whole number, got {test_size}; "
                "write 0.1 for a tenth, 100 for a hundred examples"
            )
        num_test = round(test_size * len(distinct))
        if test_size > 0 and num_test == 0:
            raise ValueError(
                f"test_size must give {whose} at least one of {len(distinct)} examples to test on, "
                f"got {test_size}; raise it, or leave out clients so small "
                f"(data.min_examples={len(distinct) + 1})"
            )
    else:
        num_test = test_size
        if num_test < 0:
            raise ValueError(f"test_size must be at least 0, got {test_size}; raise it")
    if num_test >= len(distinct):
        raise ValueError(
            f"test_size must leave {whose} at least one of {len(distinct)} examples to train on, "
            f"got {test_size}; lower it, or leave out clients so small "
            f"(data.min_examples={len(distinct) + 1})"
        )
    test = sorted(generator.permutation(distinct)[:num_test].tolist())
    held_out = set(test)
    return [index for index in indices if index not in held_out], test


def split_pool(
    labels: Sequence[str], per_category: int, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Take ``per_category`` test examples of each label out of the pool.

    Source: FLEx (Liu et al., 2025, arXiv:2506.00965), Dirichlet setting: 25 per category.

    Returns:
        The indices that stay in the pool and those for testing, both ascending.

    Raises:
        ValueError: ``per_category`` is below 1, or would use up a category.
    """
    if per_category < 1:
        raise ValueError(f"per_category must be at least 1, got {per_category}; raise it")
    codes, names = _label_codes(labels)
    test: list[int] = []
    for code, name in enumerate(names):
        members = np.flatnonzero(codes == code)
        if per_category >= len(members):
            raise ValueError(
                f"per_category must be less than the {len(members)} examples of category "
                f"{name!r}, got {per_category}; lower it or leave the category out"
            )
        test.extend(generator.permutation(members)[:per_category].tolist())
    held_out = set(test)
    return [index for index in range(len(labels)) if index not in held_out], sorted(test)


@dataclass(frozen=True)
class DuplicateReport:
    """What stands more than once where it should stand once.

    Attributes:
        num_across_splits: Test examples, of any client, that also stand in a training split, of
            any client.
        num_across_clients: Different training examples that two or more clients hold.
        examples: The first few test examples that also stand in a training split.
    """

    num_across_splits: int
    num_across_clients: int
    examples: tuple[Example, ...] = ()


def find_duplicates(
    train: Mapping[str, Sequence[Example]], test: Mapping[str, Sequence[Example]]
) -> DuplicateReport:
    """Count the examples that stand in training and test, or with several clients.

    Two examples are the same when their ``content_hash`` is. The names of ``test`` need not be
    clients: a central test split is one more name.
    """
    holders: Counter[str] = Counter()
    for examples in train.values():
        holders.update({content_hash(example) for example in examples})
    leaked = [
        example
        for examples in test.values()
        for example in examples
        if content_hash(example) in holders
    ]
    return DuplicateReport(
        num_across_splits=len(leaked),
        num_across_clients=sum(num_holders > 1 for num_holders in holders.values()),
        examples=tuple(leaked[:_NUM_SHOWN]),
    )


def without_duplicates(
    train: Mapping[str, Sequence[Example]], test: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, list[Example]], int]:
    """Remove from training what also stands in a test split, of any client.

    Returns:
        The training splits without those examples, and the number removed.

    Raises:
        ValueError: A client would have nothing left to train on.
    """
    held_out = {content_hash(example) for examples in test.values() for example in examples}
    kept = {
        client_id: [example for example in examples if content_hash(example) not in held_out]
        for client_id, examples in train.items()
    }
    for client_id, examples in kept.items():
        if train[client_id] and not examples:
            raise ValueError(
                f"client {client_id!r} must keep at least one training example, got 0 of "
                f"{len(train[client_id])} that stand in no test split; lower test_size or leave "
                "the client out"
            )
    num_removed = sum(len(train[client_id]) - len(kept[client_id]) for client_id in kept)
    return kept, num_removed


def _client_ids(num_clients: int) -> list[str]:
    # As many digits as the last one needs, so that the order of ids is the order of clients.
    num_digits = max(2, len(str(num_clients - 1)))
    return [f"client_{number:0{num_digits}d}" for number in range(num_clients)]


def _label_codes(labels: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the number of each example's label, and the labels in alphabetical order."""
    names = sorted(set(labels))
    numbers = {name: number for number, name in enumerate(names)}
    return np.asarray([numbers[label] for label in labels], dtype=np.int64), names


def _check_num_clients(num_clients: int, *, num_examples: int) -> None:
    if num_examples < 1:
        raise ValueError("examples must be at least 1, got 0; choose a data set with examples")
    if not 1 <= num_clients <= num_examples:
        raise ValueError(
            f"num_clients must be in 1..{num_examples} (the number of examples), got "
            f"{num_clients}; lower num_clients or add examples"
        )


def _check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"alpha must be a finite number > 0, got {alpha}; choose 0.1 for strong skew, 100 for "
            "almost none"
        )
