"""Personal tensors between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from orchard import trees
from orchard.client.store import ClientStore, Personal


def personal(value: float) -> Personal:
    return Personal({"layers.0.graft.gate.weight": torch.full((3,), value)})


def value_of(found: Personal | None) -> float | None:
    return None if found is None else found.tensors["layers.0.graft.gate.weight"][0].item()


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "clients" / "office 1", base_digest="a" * 64)


def test_a_client_begins_with_nothing(store: ClientStore) -> None:
    assert store.load(before_round=1) is None
    assert not store.folder.exists()


def test_a_round_trip_changes_no_bit(store: ClientStore) -> None:
    tensors = {
        "float": torch.randn(4, 3).t(),
        "bfloat16": torch.randn(3).to(torch.bfloat16),
        "count": torch.tensor(7),
    }
    store.save(Personal(tensors), round_number=1)
    found = store.load(before_round=2)
    assert found is not None
    assert trees.digest(found.tensors) == trees.digest(tensors)


def test_a_round_starts_from_the_newest_version_before_it(store: ClientStore) -> None:
    store.save(personal(2.0), round_number=2)
    store.save(personal(5.0), round_number=5)
    assert value_of(store.load(before_round=9)) == 5.0
    assert value_of(store.load(before_round=6)) == 5.0
    assert value_of(store.load(before_round=3)) == 2.0
    assert value_of(store.load(before_round=2)) is None


def test_a_round_that_is_run_again_starts_from_the_version_before_it(store: ClientStore) -> None:
    store.save(personal(1.0), round_number=1)
    store.save(personal(2.0), round_number=2)
    assert value_of(store.load(before_round=2)) == 1.0
    store.save(personal(2.5), round_number=2)
    assert value_of(store.load(before_round=2)) == 1.0
    assert value_of(store.load(before_round=3)) == 2.5


def test_the_first_round_run_again_starts_from_nothing(store: ClientStore) -> None:
    store.save(personal(1.0), round_number=1)
    assert store.load(before_round=1) is None


def test_older_versions_go_and_the_two_before_stay(store: ClientStore) -> None:
    for number in (1, 4, 6, 10):
        store.save(personal(float(number)), round_number=number)
        store.save(personal(float(number)), round_number=number)
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "round_000004.safetensors",
        "round_000006.safetensors",
        "round_000010.safetensors",
    ]
    assert value_of(store.load(before_round=10)) == 6.0


def test_another_base_is_an_error(store: ClientStore) -> None:
    store.save(personal(1.0), round_number=1)
    other = ClientStore(store.folder, base_digest="b" * 64)
    start = "personal tensors of office 1 must belong to this base model, got base aaaaaaaaaaaa "
    with pytest.raises(ValueError, match=f"^{start}instead of bbbbbbbbbbbb; "):
        other.load(before_round=2)


def test_what_a_crash_left_half_written_is_ignored(store: ClientStore) -> None:
    store.save(personal(1.0), round_number=1)
    (store.folder / ".round_000002.safetensors.partial").write_bytes(b"half")
    assert value_of(store.load(before_round=3)) == 1.0
    store.save(personal(2.0), round_number=2)
    assert value_of(store.load(before_round=3)) == 2.0


def test_loading_leaves_the_file_alone(store: ClientStore) -> None:
    store.save(personal(1.0), round_number=1)
    found = store.load(before_round=2)
    assert found is not None
    found.tensors["layers.0.graft.gate.weight"].zero_()
    assert value_of(store.load(before_round=2)) == 1.0


def test_clients_have_folders_of_their_own(tmp_path: Path) -> None:
    first, second = (ClientStore(tmp_path / name, base_digest="a") for name in ("a", "b"))
    first.save(personal(1.0), round_number=1)
    assert second.load(before_round=2) is None


def test_personal_tensors_are_no_mapping() -> None:
    kept = personal(1.0)
    assert not isinstance(kept, Mapping)
    assert not hasattr(kept, "items")
    with pytest.raises(TypeError):
        {**kept}  # type: ignore[dict-item]  # noqa: B018
