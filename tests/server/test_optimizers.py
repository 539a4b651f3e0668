"""How the global tree moves."""

from __future__ import annotations

import math

import pytest
import torch

from orchard import trees
from orchard.communication.messages import Update
from orchard.server.aggregation import mean
from orchard.server.optimizers import SGD, Adaptive, ServerOptimizer

ALL = [
    SGD(),
    SGD(lr=0.5, momentum=0.9, dampening=0.1),
    Adaptive("adagrad", beta1=0.0),
    Adaptive("adam"),
    Adaptive("yogi"),
]


def draw(seed: int, *shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"name {i}": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}


def walk(optimizer: ServerOptimizer, deltas: list[float], start: float = 0.0) -> list[float]:
    """Return the values of one number after each of its deltas."""
    shared, slots = optimizer.start({"x": torch.tensor([start], dtype=torch.float64)})
    values = []
    for delta in deltas:
        shared, slots = optimizer.step(
            shared, {"x": torch.tensor([delta], dtype=torch.float64)}, slots
        )
        values.append(shared["x"].item())
    return values


def test_sgd_with_lr_1_and_one_client_returns_that_clients_model() -> None:
    before, local = draw(0, (3, 4), (5,)), draw(1, (3, 4), (5,))
    shared, slots = SGD().start(before)
    delta = mean([Update("a", 1, trees.subtract(local, before), dict.fromkeys(local, 17.0))])
    shared, _ = SGD().step(shared, delta, slots)
    for name in local:
        torch.testing.assert_close(shared[name], local[name], rtol=1e-6, atol=1e-6)


def test_sgd_steps_along_the_mean_delta() -> None:
    assert walk(SGD(lr=0.5), [1.0, -4.0], start=2.0) == [2.5, 0.5]


def test_sgd_momentum_starts_as_the_delta_itself() -> None:
    # m = 1, then 0.9 * 1 + 0.1 * 2 = 1.1, then 0.9 * 1.1 + 0.1 * 0 = 0.99
    values = walk(SGD(lr=1.0, momentum=0.9, dampening=0.1), [1.0, 2.0, 0.0])
    assert values == pytest.approx([1.0, 2.1, 3.09], rel=1e-12)


def test_sgd_momentum_without_dampening_is_that_of_torch() -> None:
    deltas = [1.0, 2.0, -3.0, 0.5]
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=0.9)
    expected = []
    for delta in deltas:
        parameter.grad = torch.tensor([-delta], dtype=torch.float64)
        optimizer.step()
        expected.append(parameter.item())
    assert walk(SGD(lr=0.3, momentum=0.9), deltas) == pytest.approx(expected, rel=1e-12)


def test_sgd_momentum_of_a_name_starts_when_it_is_first_sent() -> None:
    optimizer = SGD(lr=1.0, momentum=0.9, dampening=0.1)
    shared, slots = optimizer.start({"x": torch.zeros(1), "y": torch.zeros(1)})
    shared, slots = optimizer.step(shared, {"x": torch.ones(1)}, slots)
    assert set(slots["momentum"]) == {"x"}
    shared, slots = optimizer.step(shared, {"y": torch.full((1,), 5.0)}, slots)
    assert shared["y"].item() == 5.0
    assert shared["x"].item() == 1.0


@pytest.mark.parametrize("rule", ["adagrad", "adam", "yogi"])
def test_adaptive_rules_follow_reddi_algorithm_2(rule: str) -> None:
    lr, beta1, beta2, tau = 0.1, 0.9, 0.99, 0.01
    deltas = [0.5, -0.25, 0.02, 0.0, 1.5]
    x, m, v, expected = 3.0, 0.0, tau**2, []
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        if rule == "adagrad":
            v = v + delta**2
        elif rule == "yogi":
            v = v - (1 - beta2) * delta**2 * math.copysign(1.0, v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + lr * m / (math.sqrt(v) + tau)
        expected.append(x)
    optimizer = Adaptive(rule, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    assert walk(optimizer, deltas, start=3.0) == pytest.approx(expected, rel=1e-6)


def test_adam_worked_number() -> None:
    # v = 0.99 * 0.01 + 0.01 * 4 = 0.0499; m = 0.1 * 2 = 0.2; x = 0.2 / (sqrt(0.0499) + 0.1)
    (x,) = walk(Adaptive("adam", lr=1.0, tau=0.1), [2.0])
    assert x == pytest.approx(0.2 / (0.0499**0.5 + 0.1), rel=1e-6)
    assert x == pytest.approx(0.618462, abs=1e-6)


def test_yogi_worked_numbers() -> None:
    # Rising: v = 0.01 + 0.01 * 4 = 0.05. Falling: v = 0.01 - 0.01 * 0.0025 = 0.009975.
    (rising,) = walk(Adaptive("yogi", lr=1.0, tau=0.1), [2.0])
    assert rising == pytest.approx(0.2 / (0.05**0.5 + 0.1), rel=1e-6)
    (falling,) = walk(Adaptive("yogi", lr=1.0, tau=0.1), [0.05])
    assert falling == pytest.approx(0.005 / (0.009975**0.5 + 0.1), rel=1e-6)


def test_adagrad_worked_numbers() -> None:
    # v = 0.01 + 4 = 4.01, then 4.01 + 1 = 5.01; m is the delta itself
    values = walk(Adaptive("adagrad", lr=1.0, beta1=0.0, tau=0.1), [2.0, 1.0])
    first = 2 / (4.01**0.5 + 0.1)
    assert values == pytest.approx([first, first + 1 / (5.01**0.5 + 0.1)], rel=1e-6)


@pytest.mark.parametrize("beta2", [0.99, 0.5])
def test_adam_matches_torch_once_its_bias_correction_is_undone(beta2: float) -> None:
    lr, beta1, tau, rounds = 0.05, 0.9, 1e-3, 12
    before = draw(2, (4, 3), (6,))
    ours = Adaptive("adam", lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    shared, slots = ours.start(before)
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in before.items()}
    theirs = torch.optim.Adam(parameters.values(), betas=(beta1, beta2))
    for parameter in parameters.values():  # v starts at tau^2
        theirs.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.full_like(parameter, tau**2),
        }
    for step in range(1, rounds + 1):
        delta = draw(100 + step, (4, 3), (6,))
        shared, slots = ours.step(shared, delta, slots)
        # lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps), with both factors undone
        correction = math.sqrt(1 - beta2**step)
        theirs.param_groups[0]["lr"] = lr * (1 - beta1**step) / correction
        theirs.param_groups[0]["eps"] = tau / correction
        for name, parameter in parameters.items():
            parameter.grad = -delta[name]
        theirs.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(shared[name], parameter.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_a_name_without_delta_keeps_its_value_and_slots(optimizer: ServerOptimizer) -> None:
    shared, slots = optimizer.start(draw(0, (3,), (4,)))
    shared, slots = optimizer.step(shared, draw(1, (3,), (4,)), slots)
    kept = {"value": shared["name 1"], **{key: tree["name 1"] for key, tree in slots.items()}}
    before = trees.digest(kept)
    after, slots = optimizer.step(shared, draw(2, (3,)), slots)
    now = {"value": after["name 1"], **{key: tree["name 1"] for key, tree in slots.items()}}
    assert trees.digest(now) == before
    assert not torch.equal(after["name 0"], shared["name 0"])


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_a_step_leaves_the_state_before_it_alone(optimizer: ServerOptimizer) -> None:
    shared, slots = optimizer.start(draw(0, (3,), (4,)))
    shared, slots = optimizer.step(shared, draw(1, (3,), (4,)), slots)
    before = [trees.digest(tree) for tree in (shared, *slots.values())]
    optimizer.step(shared, draw(2, (3,), (4,)), slots)
    assert [trees.digest(tree) for tree in (shared, *slots.values())] == before


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_values_and_slots_share_no_memory(optimizer: ServerOptimizer) -> None:
    shared, slots = optimizer.start(draw(0, (3,)))
    for seed in range(1, 4):
        shared, slots = optimizer.step(shared, draw(seed, (3,)), slots)
        held = [tree["name 0"].data_ptr() for tree in (shared, *slots.values())]
        assert len(set(held)) == len(held)


def test_sgd_without_momentum_steps_in_the_memory_of_the_delta() -> None:
    delta = draw(1, (3,))
    shared, _ = SGD(lr=0.5).step(draw(0, (3,)), delta, {})
    assert shared["name 0"].data_ptr() == delta["name 0"].data_ptr()


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_an_unknown_name_is_an_error(optimizer: ServerOptimizer) -> None:
    shared, slots = optimizer.start(draw(0, (3,)))
    with pytest.raises(ValueError, match=r"^update must hold names of the global tree, got stray"):
        optimizer.step(shared, {"stray": torch.ones(3)}, slots)


@pytest.mark.parametrize("optimizer", ALL, ids=str)
def test_the_global_tree_begins_with_the_adapters(optimizer: ServerOptimizer) -> None:
    adapters = draw(0, (3, 2), (4,))
    shared, slots = optimizer.start(adapters)
    assert trees.equal(shared, adapters)
    for slot in slots.values():
        assert {n: t.shape for n, t in slot.items()} == {n: t.shape for n, t in adapters.items()}
        assert all(tensor.dtype == torch.float32 for tensor in slot.values())
