"""What a client keeps of its messages: residuals and the values that it was sent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchard.client.kept_messages import read_task, write_update
from orchard.client.store import ClientStore, Personal
from orchard.communication.channel import Channel, MissingCopyError
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.communication.quantization import Int8
from orchard.communication.sparsification import TopK
from orchard.communication.stages import Cast, Stage
from orchard.trees import Tree, equal

LOSSY = {"int8": (Int8(),), "top-k": (TopK(0.1), Cast(torch.bfloat16)), "both": (TopK(0.1), Int8())}
BFLOAT16 = Cast(torch.bfloat16)


def store_in(folder: Path) -> ClientStore:
    return ClientStore(folder, "a" * 64)


def update_of(delta: Tree, round_number: int) -> Update:
    return Update("a", round_number, delta, dict.fromkeys(delta, 3.0))


def task_of(shared: Tree, round_number: int) -> Task:
    return Task(round_number, shared, LocalSettings(steps=0, epochs=1, learning_rate=1e-3))


def draw(round_number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(round_number)
    return {name: torch.randn(30, 20, generator=generator) for name in ("a", "b")}


@pytest.mark.parametrize("stages", LOSSY.values(), ids=LOSSY)
def test_what_arrives_over_rounds_is_what_was_meant_but_for_the_last_residual(
    stages: tuple[Stage, ...], tmp_path: Path
) -> None:
    channel, store = Channel(stages, has_feedback=True), store_in(tmp_path)
    meant = received = torch.zeros(30, 20, dtype=torch.float64)
    for number in range(1, 31):
        meant = meant + draw(number)["a"].double()
        message = write_update(update_of(draw(number), number), channel, store)
        received = received + channel.unpack_update(message).delta["a"].double()
    kept = store.beside("residual").load(before_round=31)
    assert kept is not None
    torch.testing.assert_close(received + kept.tensors["a"], meant, rtol=0, atol=1e-4)
    # It does not grow with the rounds: about what one update loses of its own and the last.
    assert float(kept.tensors["a"].abs().max()) < (12 if "TopK" in str(stages) else 0.03)


def test_without_feedback_small_values_never_arrive(tmp_path: Path) -> None:
    delta = {"a": torch.tensor([1.0, 1e-3])}
    arrived = {}
    for has_feedback in (True, False):
        channel, store = Channel((Int8(),), has_feedback=has_feedback), store_in(tmp_path)
        total = torch.zeros(2)
        for number in range(1, 101):
            message = write_update(update_of(delta, number), channel, store)
            total += channel.unpack_update(message).delta["a"]
        arrived[has_feedback] = float(total[1])
    assert arrived[False] == 0.0
    assert arrived[True] == pytest.approx(0.1, abs=0.008)
    assert not any((tmp_path / "residual").glob("*_000101*"))


def test_a_round_that_is_run_again_sends_the_same_bytes(tmp_path: Path) -> None:
    channel, store = Channel((Int8(),), has_feedback=True), store_in(tmp_path)
    first = [write_update(update_of(draw(n), n), channel, store) for n in (1, 2, 3)]
    # The server may go back to its second newest checkpoint.
    again = [write_update(update_of(draw(n), n), channel, store) for n in (2, 3)]
    assert again == first[1:]


def test_a_name_that_is_not_sent_keeps_its_residual(tmp_path: Path) -> None:
    channel, store = Channel((Int8(),), has_feedback=True), store_in(tmp_path)
    write_update(update_of(draw(1), 1), channel, store)
    own = store.beside("residual")
    before = own.load(before_round=2)
    assert before is not None
    write_update(update_of({"b": draw(2)["b"]}, 2), channel, store)
    after = own.load(before_round=3)
    assert after is not None
    assert torch.equal(after.tensors["a"], before.tensors["a"])
    assert not torch.equal(after.tensors["b"], before.tensors["b"])
    message = write_update(update_of(draw(3), 3), channel, store)
    alone = Channel((Int8(),)).pack_update(
        update_of({"a": draw(3)["a"] + before.tensors["a"], "b": draw(3)["b"]}, 3)
    )
    received, expected = (channel.unpack_update(m).delta["a"] for m in (message, alone))
    assert torch.equal(received, expected)


def test_a_residual_stays_with_its_client_and_its_base(tmp_path: Path) -> None:
    channel, store = Channel((Int8(),), has_feedback=True), store_in(tmp_path)
    write_update(update_of(draw(1), 1), channel, store)
    assert store.load(before_round=9) is None  # what is personal lives beside it
    with pytest.raises(ValueError, match="must belong to this base model"):
        write_update(update_of(draw(2), 2), channel, ClientStore(tmp_path, "b" * 64))


def test_an_update_without_names_or_feedback_keeps_nothing(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    write_update(update_of({}, 1), Channel((Int8(),), has_feedback=True), store)
    write_update(update_of(draw(1), 1), Channel((Int8(),)), store)
    read_task(Channel().broadcast(task_of(draw(1), 1), {}).whole, Channel(), store)
    assert list(tmp_path.rglob("*")) == []


def test_integers_have_no_residual(tmp_path: Path) -> None:
    channel, store = Channel((Int8(),), has_feedback=True), store_in(tmp_path)
    count = torch.tensor([7])
    for number in (1, 2):
        message = write_update(update_of({**draw(1), "n": count}, number), channel, store)
        assert torch.equal(channel.unpack_update(message).delta["n"], count)


def test_a_client_follows_differences_from_its_disk_and_asks_where_it_cannot(
    tmp_path: Path,
) -> None:
    channel = Channel((BFLOAT16,), (BFLOAT16,), differences=(Int8(),))
    store, held = store_in(tmp_path / "a"), {}
    late = store_in(tmp_path / "b")
    for number in range(1, 4):
        broadcast = channel.broadcast(task_of(draw(number), number), held)
        held = broadcast.task.shared
        assert equal(read_task(broadcast.since, channel, store).shared, held)
        # A round that is run again reads the same.
        assert equal(read_task(broadcast.since, channel, store).shared, held)
    with pytest.raises(MissingCopyError):
        read_task(broadcast.since, channel, late)
    assert equal(read_task(broadcast.whole, channel, late).shared, held)
    broadcast = channel.broadcast(task_of(draw(4), 4), held)
    for own in (store, late):
        assert equal(read_task(broadcast.since, channel, own).shared, broadcast.task.shared)


def test_a_copy_that_was_changed_on_disk_is_not_followed(tmp_path: Path) -> None:
    channel = Channel((BFLOAT16,), (BFLOAT16,), differences=(Int8(),))
    store = store_in(tmp_path)
    held = read_task(channel.broadcast(task_of(draw(1), 1), {}).whole, channel, store).shared
    store.beside("held").save(Personal({**held, "a": held["a"] + 1}), round_number=1)
    broadcast = channel.broadcast(task_of(draw(2), 2), held)
    with pytest.raises(MissingCopyError, match="send the whole values"):
        read_task(broadcast.since, channel, store)
