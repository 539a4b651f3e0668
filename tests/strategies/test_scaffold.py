"""The control variates of a server; ``test_matrix.py`` has those of clients."""

from __future__ import annotations

import pytest
import torch

from orchard.server.optimizers import SGD
from orchard.strategies.scaffold import WithControl


def test_values_move_by_the_inner_optimizer_and_controls_by_the_share_of_clients() -> None:
    optimizer = WithControl(SGD(lr=0.5), participation=0.25)
    shared, slots = optimizer.start({"a": torch.ones(2), "b": torch.ones(1)})
    delta = {"a": torch.full((2,), 2.0), "control.a": torch.full((2,), 8.0)}
    moved, _ = optimizer.step(shared, delta, slots)
    assert {name: tensor.tolist() for name, tensor in moved.items()} == {
        "a": [2.0, 2.0],
        "b": [1.0],
        "control.a": [2.0, 2.0],
        "control.b": [0.0],
    }


@pytest.mark.parametrize("name", ["c", "control.c"])
def test_a_name_that_the_server_does_not_have_is_refused(name: str) -> None:
    optimizer = WithControl(SGD(lr=1.0), participation=1.0)
    shared, slots = optimizer.start({"a": torch.ones(2)})
    with pytest.raises(
        ValueError, match=rf"^update must hold names of the global tree, got {name};"
    ):
        optimizer.step(shared, {name: torch.ones(2)}, slots)
