"""What a client says of the experts that it grafts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from federations import build, quick_recipe
from orchard.client.client import Client
from orchard.data.encoded import blocks
from orchard.experts.graft_search import LayerSearch
from orchard.experts.grafting import GraftSettings
from orchard.experts.reconstruction import batch_blocks, read_layers, reconstruction_losses
from orchard.results import Metrics
from orchard.strategies.flex import FlexSettings, _calibration_examples, _share, choose_experts


def test_what_a_set_misses_is_a_share_of_the_layers_output() -> None:
    assert _share(LayerSearch(output_norm=4.0, sets={}), 1.0) == 0.25
    # A layer without any output misses nothing of it.
    assert _share(LayerSearch(output_norm=0.0, sets={}), 0.0) == 0.0


def chosen_by(tmp_path: Path, *overrides: str) -> tuple[Client, FlexSettings, Metrics]:
    _, clients, _, _ = build(quick_recipe("flex", *overrides), tmp_path)
    settings = FlexSettings(GraftSettings(), calibration_blocks=4, calibration_tokens=64)
    for override in overrides:
        if override == "strategy.graft_experts=2":
            settings = replace(settings, num_experts=2)
        if override == "strategy.graft_choice=random":
            settings = replace(settings, choice="random")
    return clients[0], settings, choose_experts(clients[0], settings)[1]


def test_a_choice_says_what_it_chose_and_what_that_the_next_and_none_would_miss(
    tmp_path: Path,
) -> None:
    client, settings, metrics = chosen_by(tmp_path)
    view = client.model.view
    calibration = blocks(_calibration_examples(client, settings), block_tokens=64, max_blocks=4)
    taken: list[list[float]] = [[] for _ in view.layers]

    def take(index: int, x_TD: torch.Tensor, routed_TD: torch.Tensor) -> None:
        taken[index].append(float(routed_TD.double().norm()))

    with client.model.without_adapters(), torch.no_grad():
        batches = list(batch_blocks(calibration, batch_size=8, device=torch.device("cpu")))
        losses = reconstruction_losses(view, batches)
        read_layers(view, [(own, partial(take, i)) for i, own in enumerate(view.layers)], batches)
    for layer, loss_E, norms in zip(view.layers, losses, taken, strict=True):
        none, ranked = sum(norms), loss_E.sort()
        best, second = ranked.values[:2].tolist()
        assert metrics[f"client/graft_expert_{layer.name}"] == ranked.indices[0]
        assert metrics[f"client/graft_output_norm_{layer.name}"] == pytest.approx(none)
        assert metrics[f"client/graft_loss_none_{layer.name}"] == 1
        assert metrics[f"client/graft_loss_{layer.name}"] == pytest.approx(best / none)
        assert metrics[f"client/graft_loss_second_{layer.name}"] == pytest.approx(second / none)


def test_a_choice_of_several_names_each_and_the_best_other_set(tmp_path: Path) -> None:
    client, settings, metrics = chosen_by(tmp_path, "strategy.graft_experts=2")
    chosen, _ = choose_experts(client, settings)
    for layer, experts in zip(client.model.view.layers, chosen, strict=True):
        named = [metrics[f"client/graft_expert_{layer.name}_{place}"] for place in (0, 1)]
        assert tuple(named) == experts
        loss = metrics[f"client/graft_loss_{layer.name}"]
        assert 0 < loss <= metrics[f"client/graft_loss_second_{layer.name}"]


def test_a_random_choice_names_its_expert_and_claims_no_loss(tmp_path: Path) -> None:
    _, _, metrics = chosen_by(tmp_path, "strategy.graft_choice=random")
    assert metrics
    assert all(key.startswith("client/graft_expert_") for key in metrics)
