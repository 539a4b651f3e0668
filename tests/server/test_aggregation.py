"""The kernel: a mean over the clients that sent a name."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard import trees
from orchard.communication.messages import Update
from orchard.server.aggregation import WeightedMean, mean
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import Strategy, update_server

NAMES = ("layers.0.q_proj.lora_A", "layers.0.router.3", "layers.1.experts.2.down_proj.lora_B")
SHAPES = ((3, 4), (5,), ())


def update(delta: trees.Tree, weight: float | dict[str, float], client: str = "a") -> Update:
    weights = weight if isinstance(weight, dict) else dict.fromkeys(delta, weight)
    return Update(client_id=client, round_number=1, delta=delta, weight=weights)


def draw_updates(num_clients: int = 6, seed: int = 0) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    updates = []
    for client in range(num_clients):
        delta = {n: torch.randn(s, generator=generator) for n, s in zip(NAMES, SHAPES, strict=True)}
        weights = torch.rand(len(NAMES), generator=generator) * 100
        weight = dict(zip(NAMES, weights.tolist(), strict=True))
        updates.append(update(delta, weight, f"client {client}"))
    return updates


def assert_close(left: trees.Tree, right: trees.Tree) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(6)))
def test_the_order_of_clients_does_not_matter(order: list[int]) -> None:
    updates = draw_updates()
    assert_close(mean([updates[index] for index in order]), mean(updates))


def test_a_fixed_order_gives_the_same_bits() -> None:
    assert trees.equal(mean(draw_updates()), mean(draw_updates()))


def test_the_mean_is_the_weighted_mean_in_float64() -> None:
    updates = draw_updates()
    for name, value in mean(updates).items():
        weights = [u.weight[name] for u in updates]
        total = sum(w * u.delta[name].double() for w, u in zip(weights, updates, strict=True))
        torch.testing.assert_close(value.double(), total / math.fsum(weights), rtol=1e-5, atol=1e-6)


def test_a_worked_mean() -> None:
    updates = [
        update({"a": torch.tensor([1.0, 2.0])}, 1.0),
        update({"a": torch.tensor([5.0, -2.0])}, 3.0),
    ]
    assert mean(updates)["a"].tolist() == [4.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_updates_average_to_themselves(dtype: torch.dtype) -> None:
    delta = {name: value.to(dtype) for name, value in draw_updates(1)[0].delta.items()}
    result = mean([update(delta, weight) for weight in (1.0, 300.0, 0.1, 0.0, 7.0)])
    assert all(tensor.dtype == torch.float32 for tensor in result.values())
    assert_close(result, {name: value.float() for name, value in delta.items()})


@settings(deadline=None, max_examples=30)
@given(factor=st.floats(1e-6, 1e6))
def test_scaling_all_weights_changes_nothing(factor: float) -> None:
    updates = draw_updates()
    scaled = [update(u.delta, {n: factor * w for n, w in u.weight.items()}) for u in updates]
    assert_close(mean(scaled), mean(updates))


def test_scaling_all_weights_by_a_power_of_two_changes_no_bit() -> None:
    updates = draw_updates()
    scaled = [update(u.delta, {n: 1024 * w for n, w in u.weight.items()}) for u in updates]
    assert trees.equal(mean(scaled), mean(updates))


@pytest.mark.parametrize("border", range(7))
def test_merged_partial_sums_are_the_streamed_mean(border: int) -> None:
    updates = draw_updates()
    parts = [WeightedMean(), WeightedMean()]
    for index, u in enumerate(updates):
        parts[index >= border].add(u.delta, u.weight)
    parts[0].merge(parts[1])
    assert_close(parts[0].mean(), mean(updates))


def test_merging_leaves_the_other_sums_alone() -> None:
    first, second = WeightedMean(), WeightedMean()
    second.add({"a": torch.tensor([1.0])}, {"a": 2.0})
    first.merge(second)
    first.add({"a": torch.tensor([7.0])}, {"a": 2.0})
    assert second.mean()["a"].tolist() == [1.0]
    assert first.mean()["a"].tolist() == [4.0]


def test_adding_leaves_the_update_alone() -> None:
    updates = draw_updates()
    before = [trees.digest(u.delta) for u in updates]
    mean(updates)
    assert [trees.digest(u.delta) for u in updates] == before
    (single,) = draw_updates(1)
    result = mean([single])
    assert all(result[name].data_ptr() != single.delta[name].data_ptr() for name in result)


def test_a_stream_is_read_once() -> None:
    read = []

    def stream() -> Iterator[Update]:
        for index, u in enumerate(draw_updates()):
            read.append(index)
            yield u

    assert_close(mean(stream()), mean(draw_updates()))
    assert read == list(range(6))


def test_a_name_nobody_sent_is_absent() -> None:
    assert mean([]) == {}
    assert set(mean([update({"a": torch.ones(1)}, 1.0)])) == {"a"}


def test_a_name_averages_over_its_senders_alone() -> None:
    result = mean(
        [
            update({"a": torch.tensor([2.0]), "b": torch.tensor([10.0])}, {"a": 1.0, "b": 5.0}),
            update({"a": torch.tensor([4.0])}, {"a": 3.0}),
            update({"c": torch.tensor([-1.0])}, {"c": 0.5}),
        ]
    )
    assert {name: value.item() for name, value in result.items()} == {"a": 3.5, "b": 10.0, "c": -1}


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.05, {(0, 0): 1.75, (0, 1): 1.75, (0, 2): 1.0, (1, 0): 1.0, (1, 1): 1.0, (1, 2): 1.75}),
        (0.2, {(0, 0): 1.75, (0, 1): 1.0, (1, 0): 1.0, (1, 1): 1.0, (1, 2): 1.75}),
    ],
)
def test_experts_that_pass_a_threshold_average_as_in_hfedmoe(
    threshold: float, expected: dict[tuple[int, int], float]
) -> None:
    # HFedMoE, Eq. 17: client 0 has 100 examples and the value 1, client 1 has 300 and 2.
    usage = [
        [[0.475, 0.35, 0.175], [0.225, 0.35, 0.425]],
        [[0.9, 0.06, 0.04], [0.02, 0.03, 0.95]],
    ]
    updates = []
    for client, layers in enumerate(usage):
        delta = {
            f"layers.{layer}.experts.{expert}": torch.tensor([client + 1.0])
            for layer, row in enumerate(layers)
            for expert, used in enumerate(row)
            if used >= threshold
        }
        updates.append(update(delta, (100.0, 300.0)[client]))
    result = {name: value.item() for name, value in mean(updates).items()}
    assert result == {f"layers.{la}.experts.{e}": value for (la, e), value in expected.items()}


def test_a_name_without_weight_does_not_count() -> None:
    sums = WeightedMean()
    sums.add({"a": torch.ones(1), "b": torch.ones(1)}, {"a": 1.0})
    assert set(sums.mean()) == {"a"}


def test_weight_zero_counts_nothing() -> None:
    updates = [update({"a": torch.tensor([2.0])}, 1.0), update({"a": torch.tensor([9.0])}, 0.0)]
    assert mean(updates)["a"].tolist() == [2.0]
    assert mean(updates[::-1])["a"].tolist() == [2.0]


def test_all_weights_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^weights of b must not all be 0, got 0\.0; "):
        mean([update({"a": torch.ones(1), "b": torch.ones(1)}, {"a": 1.0, "b": 0.0})] * 2)


@pytest.mark.parametrize("weight", [-1.0, -1e-9, math.nan, math.inf, -math.inf])
def test_a_weight_that_is_negative_or_not_finite_is_an_error(weight: float) -> None:
    with pytest.raises(ValueError, match=f"^weight of a must be a finite number .* got {weight}"):
        mean([update({"a": torch.ones(1)}, 1.0), update({"a": torch.ones(1)}, weight)])


@pytest.mark.parametrize("shape", [(3, 2), (1,), (), (2, 3, 1), (1, 3)])
def test_a_shape_that_differs_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^a must have shape \(2, 3\) as in earlier updates"):
        mean([update({"a": torch.ones(2, 3)}, 1.0), update({"a": torch.ones(shape)}, 1.0)])


def test_partial_sums_of_different_shapes_do_not_merge() -> None:
    first, second = WeightedMean(), WeightedMean()
    first.add({"a": torch.ones(2, 3)}, {"a": 1.0})
    second.add({"a": torch.ones(1, 3)}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"^a must have shape"):
        first.merge(second)


def plain_mean(updates: list[Update]) -> dict[str, torch.Tensor]:
    """Return the same mean, one tensor after the other."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, float] = {}
    for u in updates:
        for name, tensor in u.delta.items():
            total = sums.setdefault(name, torch.zeros(tensor.shape))
            total.add_(tensor.float(), alpha=u.weight[name])
            counts[name] = counts.get(name, 0.0) + u.weight[name]
    return {name: total / counts[name] for name, total in sums.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_weights", [1, 3])
def test_tensors_that_are_added_together_give_the_bits_of_one_after_the_other(
    dtype: torch.dtype, num_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchard.server.aggregation._GATHERED", 500)
    monkeypatch.setattr("orchard.server.aggregation._BLOCK", 128)
    generator = torch.Generator().manual_seed(3)
    updates = []
    for client in range(4):
        delta = {f"{i}": torch.randn(7 + 13 * i, generator=generator).to(dtype) for i in range(40)}
        weight = {name: 0.1 + client + int(name) % num_weights for name in delta}
        updates.append(update(delta, weight))
    expected = plain_mean(updates)
    assert trees.equal(mean(updates), expected)


def test_an_update_is_let_go_before_the_next_is_made() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make(client: int) -> Update:
        assert not any(ref() is not None for ref in alive)
        u = update({"a": torch.full((4,), float(client))}, 1.0)
        alive.append(weakref.ref(u.delta["a"]))
        return u

    state = ServerState(0, {"a": torch.zeros(4)})
    after = update_server(Strategy(), state, map(make, range(5)))
    assert after.shared["a"].tolist() == [2.0] * 4
    assert len(alive) == 5


def test_a_mean_is_given_away_once() -> None:
    sums = WeightedMean()
    sums.add({"a": torch.tensor([3.0])}, {"a": 2.0})
    assert sums.mean()["a"].tolist() == [3.0]
    assert sums.mean() == {}
    sums.add({"a": torch.tensor([5.0])}, {"a": 1.0})
    assert sums.mean()["a"].tolist() == [5.0]
