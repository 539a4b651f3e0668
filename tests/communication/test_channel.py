"""What arrives is what was sent, within the stated error, and bytes are counted as sent."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard import trees
from orchard.communication.channel import DTYPES, Cast, Channel
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.trees import Tree

NORMAL = st.floats(2**-120, 2.0**120, width=32)


def task_of(shared: Tree) -> Task:
    return Task(2, shared, LocalSettings(steps=0, epochs=1, learning_rate=1e-3))


def update_of(delta: Tree) -> Update:
    return Update("a", 2, delta, dict.fromkeys(delta, 3.0), {"client/train_loss": 2.5})


def draw(shape: tuple[int, ...] = (7, 5)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name in ("b", "a")}


@pytest.mark.parametrize("stages", [(), (Cast(torch.float32),)], ids=["no stage", "float32"])
def test_float32_arrives_bit_for_bit(stages: tuple[Cast, ...]) -> None:
    channel = Channel(stages)
    assert trees.equal(channel.send_update(update_of(draw())).delta, draw())
    assert trees.equal(channel.send_task(task_of(draw())).shared, draw())


@settings(deadline=None)
@given(values=st.lists(st.tuples(NORMAL, st.sampled_from((-1.0, 1.0))), min_size=1, max_size=50))
def test_bfloat16_is_within_its_stated_error(values: list[tuple[float, float]]) -> None:
    sent = torch.tensor([size * sign for size, sign in values])
    received = Channel((Cast(torch.bfloat16),)).send_update(update_of({"a": sent})).delta["a"]
    assert received.dtype == torch.float32
    error = (received.double() - sent.double()).abs()
    assert bool((error <= 2**-8 * sent.double().abs()).all())


def test_bfloat16_values_arrive_exactly() -> None:
    values = draw()["a"].to(torch.bfloat16).float()
    channel = Channel((Cast(torch.bfloat16),))
    assert torch.equal(channel.send_task(task_of({"a": values})).shared["a"], values)


def test_bfloat16_leaves_integers_alone() -> None:
    counts = torch.tensor([2**40 + 1])
    channel = Channel((Cast(torch.bfloat16),))
    assert trees.equal(channel.send_update(update_of({"a": counts})).delta, {"a": counts})


def test_everything_but_the_tensors_arrives_as_it_was() -> None:
    channel = Channel((Cast(torch.bfloat16),))
    update = channel.send_update(update_of(draw()))
    assert (update.client_id, update.round_number) == ("a", 2)
    assert update.weight == {"a": 3.0, "b": 3.0}
    assert update.metrics == {"client/train_loss": 2.5}
    task = channel.send_task(task_of(draw()))
    assert (task.round_number, task.settings) == (2, task_of({}).settings)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_bytes_are_the_length_of_what_was_sent(dtype: torch.dtype) -> None:
    channel = Channel((Cast(dtype),))
    update, task = update_of(draw()), task_of(draw((3,)))
    uplink, downlink = len(channel.pack_update(update)), len(channel.pack_task(task))
    assert (channel.uplink_bytes, channel.downlink_bytes) == (0, 0)
    channel.send_update(update)
    channel.send_update(update)
    channel.send_task(task)
    assert channel.uplink_bytes == 2 * uplink
    assert channel.downlink_bytes == downlink
    channel.reset()
    assert (channel.uplink_bytes, channel.downlink_bytes) == (0, 0)


def test_bfloat16_halves_the_bytes_of_the_tensors() -> None:
    large = update_of(draw((500, 20)))
    sizes = {
        name: len(Channel((Cast(dtype),)).pack_update(large)) for name, dtype in DTYPES.items()
    }
    assert sizes["float32"] - sizes["bfloat16"] == pytest.approx(2 * 500 * 20 * 2, abs=64)


def test_the_sender_keeps_what_it_sent() -> None:
    delta = draw()
    channel = Channel((Cast(torch.bfloat16),))
    received = channel.send_update(update_of(delta)).delta
    received["a"].zero_()
    assert trees.equal(delta, draw())


@dataclass(frozen=True)
class Affine:
    """Adds or multiplies, and undoes it."""

    sign: str
    number: float

    def encode(self, tree: Tree) -> Tree:
        return {
            n: t + self.number if self.sign == "+" else t * self.number for n, t in tree.items()
        }

    def decode(self, tree: Tree) -> Tree:
        return {
            n: t - self.number if self.sign == "+" else t / self.number for n, t in tree.items()
        }


def test_stages_apply_in_order_and_undo_in_reverse() -> None:
    channel = Channel((Affine("+", 1.0), Affine("*", 4.0)))
    update = update_of({"a": torch.tensor([2.0])})
    plain = Channel().unpack_update(channel.pack_update(update))
    assert plain.delta["a"].item() == 12.0
    assert channel.send_update(update).delta["a"].item() == 2.0
