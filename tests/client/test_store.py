"""Personal tensors between rounds."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orchard import trees
from orchard.client.store import ClientStore, DamagedError, Personal, set_aside


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


def newest(store: ClientStore) -> Path:
    return max(store.folder.glob("*.safetensors"))


def test_every_flipped_bit_of_a_file_is_found_out(store: ClientStore) -> None:
    store.save(personal(1.0), round_number=1)
    content = newest(store).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        newest(store).write_bytes(changed)
        with pytest.raises(DamagedError, match=r"round_000001\.safetensors must be as"):
            store.load(before_round=2)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_file_that_was_cut_off_is_found_out(left: int, store: ClientStore) -> None:
    store.save(personal(1.0), round_number=1)
    newest(store).write_bytes(newest(store).read_bytes()[:left])
    with pytest.raises(DamagedError, match=r"round_000001\.safetensors"):
        store.load(before_round=2)


def test_what_was_written_elsewhere_is_no_version(store: ClientStore, tmp_path: Path) -> None:
    other = ClientStore(tmp_path / "clients" / "office 2", store.base_digest)
    other.save(personal(3.0), round_number=2)
    store.save(personal(1.0), round_number=1)
    renamed = store.folder / "round_000002.safetensors"
    for foreign in (newest(other), newest(store)):  # of another client, and of another round
        shutil.copy(foreign, renamed)
        with pytest.raises(DamagedError, match="what was written for round"):
            store.load(before_round=3)
    save_file(dict(personal(4.0).tensors), renamed)
    with pytest.raises(DamagedError, match="without a checksum"):
        store.load(before_round=3)
    shutil.copytree(store.folder, store.folder / "held", dirs_exist_ok=True)
    with pytest.raises(DamagedError):  # what it keeps is not what it was sent
        store.beside("held").load(before_round=2)


def test_a_damaged_version_is_set_aside_and_the_one_before_it_is_next(store: ClientStore) -> None:
    for number in (1, 2):
        store.save(personal(float(number)), round_number=number)
    for expected in (1, None):
        newest(store).write_bytes(b"damaged")
        with pytest.raises(DamagedError) as caught:
            store.load(before_round=3)
        assert set_aside(caught.value) == expected
        assert value_of(store.load(before_round=3)) == expected
    assert len(list((store.folder / "damaged").iterdir())) == 2


def test_rounds_far_ahead_make_no_client_lose_where_it_was(store: ClientStore) -> None:
    for number in (1, 2, 3, *range(90, 100)):
        store.save(personal(float(number)), round_number=number)
    assert value_of(store.load(before_round=4)) == 3.0
    for number in (200, 400, 600, 800):
        store.save(personal(float(number)), round_number=number)
    assert value_of(store.load(before_round=4)) == 3.0
    assert len(list(store.folder.iterdir())) < 12
