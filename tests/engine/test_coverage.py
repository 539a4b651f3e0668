"""What a round moved of the experts, counted by hand."""

from __future__ import annotations

import torch

from orchard.communication.messages import Update
from orchard.engine.coverage import FROZEN_ROUNDS, Coverage

SHARED = [f"layers.{i}.experts.{e}.down_proj" for i in range(2) for e in range(4)]


def update(*experts: tuple[int, int], **metrics: float) -> Update:
    names = [f"layers.{i}.experts.{e}.down_proj" for i, e in experts] + ["norm"]
    delta = {name: torch.ones(1) for name in names}
    return Update("a", 1, delta, dict.fromkeys(names, 1.0), metrics)


def test_shares_are_counted_by_layer_and_over_all() -> None:
    coverage = Coverage([*SHARED, "norm"], {})
    coverage.add(update((0, 0), (0, 1), (1, 3)))
    coverage.add(update((0, 0)))
    found = coverage.summary()
    assert found["experts/pass_rate_layers.0"] == 3 / 8
    assert found["experts/pass_rate_layers.1"] == 1 / 8
    assert found["experts/pass_rate"] == 4 / 16
    assert found["experts/moved_share_layers.0"] == 2 / 4
    assert found["experts/moved_share"] == 3 / 8
    assert found["rounds_since_sent"] == {"layers.0": [0, 0, 1, 1], "layers.1": [1, 1, 1, 0]}
    assert found["experts/frozen"] == 0


def test_an_expert_that_nobody_sends_freezes() -> None:
    since: dict[str, list[int]] = {}
    for number in range(1, FROZEN_ROUNDS + 1):
        coverage = Coverage(SHARED, since)
        coverage.add(update((0, 0), (0, 1), (0, 2), (0, 3), (1, 0)))
        found = coverage.summary()
        since = found["rounds_since_sent"]
        expected = 3 if number == FROZEN_ROUNDS else 0
        assert (found["experts/frozen_layers.0"], found["experts/frozen_layers.1"]) == (0, expected)
    coverage = Coverage(SHARED, since)
    coverage.add(update((1, 1)))
    since = coverage.summary()["rounds_since_sent"]
    assert since["layers.1"] == [1, 0, FROZEN_ROUNDS + 1, FROZEN_ROUNDS + 1]


def test_alpha_is_preference_over_the_experts_that_anyone_sent() -> None:
    coverage = Coverage(SHARED, {})
    coverage.add(update((0, 0), (0, 1), **{"client/preference": 0.3, "client/active_share": 0.5}))
    coverage.add(update((0, 1), **{"client/preference": 0.1, "client/active_share": 1.0}))
    found = coverage.summary()
    assert found["experts/alpha_sum"] == (0.3 + 0.1) / 2
    assert found["experts/active_share"] == 0.75


def test_without_experts_there_is_nothing_to_say() -> None:
    coverage = Coverage(["norm"], {})
    coverage.add(Update("a", 1, {"norm": torch.ones(1)}, {"norm": 1.0}))
    assert coverage.summary() == {}


def test_layers_are_in_the_order_of_their_numbers() -> None:
    coverage = Coverage([f"layers.{i}.experts.0.down_proj" for i in range(12)], {})
    coverage.add(update((2, 0)))
    found = coverage.summary()["rounds_since_sent"]
    assert list(found) == [f"layers.{i}" for i in range(12)]
