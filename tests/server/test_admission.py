"""Which updates are let in, by the numbers in them; ``test_bad_updates.py`` has their messages."""

from __future__ import annotations

import pytest
import torch

from orchard.communication.messages import Update
from orchard.server.admission import Admission, RefusedUpdate

SHARED = {"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}
# Norms of 3, 4 and 12: of 13 together, and below 12.7 without any one of them.
DELTA = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([-4.0]), "c": torch.tensor([12.0])}


def check(
    admission: Admission, delta: dict[str, torch.Tensor] = DELTA, *, weight: float = 1.0
) -> None:
    update = Update("a client", 2, delta, dict.fromkeys(delta, weight))
    admission.check(update, client_id="a client", round_number=2, shared=SHARED)


def test_the_bound_is_on_the_norm_of_the_whole_update() -> None:
    check(Admission(max_update_norm=13.0))
    # No tensor alone is above it, and no two are.
    with pytest.raises(RefusedUpdate, match=r"norm of the update must be at most 12\.9, got 13$"):
        check(Admission(max_update_norm=12.9))


def test_the_order_of_names_does_not_matter_to_the_bound() -> None:
    backwards = dict(reversed(DELTA.items()))
    check(Admission(max_update_norm=13.0), backwards)
    with pytest.raises(RefusedUpdate, match="norm of the update"):
        check(Admission(max_update_norm=12.9), backwards)


def test_without_a_bound_a_norm_must_fit_float32() -> None:
    check(Admission(), {"b": torch.tensor([3e38])})
    # Each value fits, and the two together do not.
    with pytest.raises(RefusedUpdate, match=r"must fit float32, got 4\.24"):
        check(Admission(), {"a": torch.tensor([3e38, 3e38])})


@pytest.mark.parametrize("weight", [0.0, 1.0, 8.0])
def test_a_weight_up_to_the_largest_is_let_in(weight: float) -> None:
    check(Admission(max_weight=8.0), weight=weight)


@pytest.mark.parametrize("weight", [-0.01, 8.01])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(RefusedUpdate, match=r"weight of a must be in 0\.\.8, got"):
        check(Admission(max_weight=8.0), weight=weight)
