"""Which updates are let in, by the numbers in them; ``test_bad_updates.py`` has their messages."""

from __future__ import annotations

import pytest
import torch

from orchard.communication.messages import Update
from orchard.server.admission import Admission, RefusedUpdate

LAYERS = {f"model.layers.{i}.mlp.experts.0.up_proj": torch.zeros(1) for i in range(12)}
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


def check_metrics(
    *names: str, shared: dict[str, torch.Tensor] = SHARED, is_own: bool = False
) -> None:
    update = Update("a client", 2, {}, {}, dict.fromkeys(names, 1.0))
    admission = Admission(has_own_metrics=is_own)
    admission.check(update, client_id="a client", round_number=2, shared=shared)


@pytest.mark.parametrize(
    "name",
    [
        *("client/train_loss", "client/evaluation_seconds", "client/preference", "local/rouge_l"),
        *("client/active_share_layers.0", "client/active_share_model.layers.47.block_sparse_moe"),
        *("client/graft_expert_model.layers.3.mlp_0", "client/graft_loss_second_encoder.block.1-a"),
    ],
)
def test_what_methods_measure_is_let_in(name: str) -> None:
    check_metrics(name)
    check_metrics(name, is_own=True)


@pytest.mark.parametrize(
    "name",
    [
        *("client/anything", "client/kind", "client/client", "client/round", "client/train_loss_"),
        *("client/anything_layers.0", "client/train_loss_layers.0", "client/gate_mean_layers"),
        "client/gate_mean_" + "a" * 119 + "00",
    ],
)
def test_a_metric_that_no_method_here_measures_is_refused(name: str) -> None:
    """Any name was taken, and stood in the run's log and tables for ever."""
    with pytest.raises(RefusedUpdate, match=r"^metric must be one that a method here measures, "):
        check_metrics(name)
    check_metrics(name, is_own=True)  # a method of one's own measures what it likes


@pytest.mark.parametrize(
    "name",
    [
        *(
            "kind",
            "client/",
            "client/Kind",
            "client/a/b",
            "client/a b",
            "client/a\n",
            "client/\u0661",
        ),
        *("global/loss", "client/é", "client/a\u0661", "client/.0", "client/0", "local/a.0"),
        *("client/" + "a" * 49, "client/a" + "0" * 160, "client/a.b"),
    ],
)
def test_a_metric_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(RefusedUpdate, match=r"^metric must be client/name or local/name, got "):
        check_metrics(name, is_own=True)
    with pytest.raises(RefusedUpdate, match=r"^metric must be one that a method here measures, "):
        check_metrics(name)


@pytest.mark.parametrize(
    ("shared", "suffix", "limit"), [(SHARED, "", 64), (SHARED, ".0", 512), (LAYERS, ".0", 768)]
)
def test_a_client_has_as_many_metrics_as_its_layers_need(
    shared: dict[str, torch.Tensor], suffix: str, limit: int
) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz_"
    names = [f"client/a{x}{y}{suffix}" for x in letters for y in letters] + [
        f"client/b{x}{y}{suffix}" for x in letters for y in letters
    ]
    check_metrics(*names[:limit], shared=shared, is_own=True)
    with pytest.raises(RefusedUpdate, match=f"must be at most {limit}, got {limit + 1}$"):
        check_metrics(*names[: limit + 1], shared=shared, is_own=True)
