"""The server's state survives a crash, or the one before it does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from orchard import trees
from orchard.server.checkpoint import ServerState, load_checkpoint, save_checkpoint
from orchard.server.optimizers import SGD, Adaptive

ABOUT = {"base": "0123abcd", "recipe": "ff", "num_clients": 4}


def state_of(round_number: int) -> ServerState:
    generator = torch.Generator().manual_seed(round_number)
    adapters = {
        "layers.0.q_proj.lora_A": torch.randn(2, 8, generator=generator),
        "layers.0.experts.1.down_proj.lora_B": torch.randn(6, 4, generator=generator).t(),
        "scalar": torch.tensor(-0.0),
    }
    optimizer = Adaptive("yogi")
    shared, slots = optimizer.start(adapters)
    shared, slots = optimizer.step(shared, adapters, slots)
    return ServerState(round_number, shared, slots)


def assert_same(found: ServerState | None, expected: ServerState) -> None:
    assert found is not None
    assert found.round_number == expected.round_number
    assert trees.digest(found.shared) == trees.digest(expected.shared)
    assert {name: trees.digest(tree) for name, tree in found.slots.items()} == {
        name: trees.digest(tree) for name, tree in expected.slots.items()
    }


def test_a_round_trip_changes_no_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(7), about=ABOUT)
    assert_same(load_checkpoint(tmp_path, about=ABOUT), state_of(7))


def test_slots_that_hold_part_of_the_names_or_none_survive(tmp_path: Path) -> None:
    optimizer = SGD(momentum=0.9)
    shared, slots = optimizer.start({"a": torch.ones(2), "b": torch.ones(3)})
    save_checkpoint(tmp_path, ServerState(0, shared, slots), about={})
    assert_same(load_checkpoint(tmp_path, about={}), ServerState(0, shared, slots))
    shared, slots = optimizer.step(shared, {"b": torch.ones(3)}, slots)
    save_checkpoint(tmp_path, ServerState(1, shared, slots), about={})
    assert_same(load_checkpoint(tmp_path, about={}), ServerState(1, shared, slots))


def test_an_empty_folder_or_none_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, about=ABOUT) is None
    assert load_checkpoint(tmp_path / "missing", about=ABOUT) is None


def test_only_this_and_the_previous_are_kept(tmp_path: Path) -> None:
    for number in (0, 1, 2, 9, 10):
        target = save_checkpoint(tmp_path, state_of(number), about=ABOUT)
        assert target.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_000009", "round_000010"]
    assert_same(load_checkpoint(tmp_path, about=ABOUT), state_of(10))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text(""),
        lambda folder: (folder / "state.json").write_text('{"round_number": 2, "tre'),
        lambda folder: (folder / "shared.safetensors").unlink(),
        lambda folder: (folder / "shared.safetensors").write_bytes(b""),
        lambda folder: truncate(folder / "shared.safetensors"),
        lambda folder: flip_last_bit(folder / "shared.safetensors"),
        lambda folder: flip_last_bit(folder / "second_moment.safetensors"),
        lambda folder: truncate(folder / "first_moment.safetensors"),
    ],
    ids=[
        "no state",
        "empty state",
        "cut state",
        "no array",
        "empty array",
        "cut array",
        "flipped bit",
        "flipped bit in a slot",
        "cut slot",
    ],
)
def test_a_damaged_checkpoint_is_skipped_for_the_previous(tmp_path: Path, damage: object) -> None:
    save_checkpoint(tmp_path, state_of(1), about=ABOUT)
    newest = save_checkpoint(tmp_path, state_of(2), about=ABOUT)
    damage(newest)  # type: ignore[operator]
    assert_same(load_checkpoint(tmp_path, about=ABOUT), state_of(1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_a_crash_while_overwriting_a_round_leaves_the_previous(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(1), about=ABOUT)
    newest = save_checkpoint(tmp_path, state_of(2), about=ABOUT)
    other = save_checkpoint(tmp_path / "other", state_of(3), about=ABOUT)
    shutil.copy(other / "shared.safetensors", newest / "shared.safetensors")
    assert_same(load_checkpoint(tmp_path, about=ABOUT), state_of(1))


def test_a_run_goes_on_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(1), about=ABOUT)
    damaged = save_checkpoint(tmp_path, state_of(2), about=ABOUT)
    (damaged / "state.json").unlink()
    save_checkpoint(tmp_path, state_of(2), about=ABOUT)
    assert_same(load_checkpoint(tmp_path, about=ABOUT), state_of(2))


def test_a_new_checkpoint_outlives_damaged_later_ones(tmp_path: Path) -> None:
    for number in (6, 7):
        (save_checkpoint(tmp_path, state_of(number), about=ABOUT) / "state.json").unlink()
    assert load_checkpoint(tmp_path, about=ABOUT) is None
    assert save_checkpoint(tmp_path, state_of(0), about=ABOUT).is_dir()
    assert_same(load_checkpoint(tmp_path, about=ABOUT), state_of(0))


def test_another_about_is_a_clear_error(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(7), about=ABOUT)
    message = (
        "base must be 0123abcd to resume from round_000007, got 9999; "
        "use the same recipe and base, or another --out"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_checkpoint(tmp_path, about={**ABOUT, "base": "9999"})
    with pytest.raises(ValueError, match=r"^new must be None to resume"):
        load_checkpoint(tmp_path, about={**ABOUT, "new": 1})


def test_saving_does_not_change_the_state(tmp_path: Path) -> None:
    state = state_of(3)
    save_checkpoint(tmp_path, state, about=ABOUT)
    assert_same(state, state_of(3))
