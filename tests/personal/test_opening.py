"""A model that is opened from its run's folder is the one that the run measured, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from federations import QUARTER, build, prepared, quick_recipe, run_quickly
from orchard.communication.messages import LocalSettings, Task
from orchard.experiment.wiring import build_channel
from orchard.models.trainable.adapters import AdaptedModel
from orchard.personal.opening import open_model
from orchard.personal.state import find_models, read_state
from orchard.recipe.options import Recipe
from orchard.results import MetricsLog
from orchard.server.checkpoint import load_checkpoint
from orchard.strategies import strategy as strategies
from orchard.strategies.strategy import evaluate_client

CARVED = ("selection.mode=carve", "selection.cadence=run", "client.budget=25%")
FULL = ("model.lora_targets=", "model.full_targets=experts,router,q_proj")
KINDS = {
    "fedavg": quick_recipe("fedavg", "server.rounds=1"),
    "flex": quick_recipe("flex", "communication.dtype=int8"),
    "two grafts": quick_recipe("flex", "server.rounds=1", "strategy.graft_experts=2"),
    "local": quick_recipe("local", "server.rounds=1"),
    "carved": quick_recipe("hfedmoe", "server.rounds=1", *CARVED),
    "flex+hfedmoe": quick_recipe("flex+hfedmoe", "server.rounds=1", *CARVED),
    "full": quick_recipe("flex", "server.rounds=1", *FULL),
}
ANEW = quick_recipe(
    "flex+hfedmoe",
    "server.rounds=1",
    "selection.mode=carve",
    "selection.cadence=round",
    "client.budget=25%",
)
IDS = torch.tensor([[5, 17, 40, 99, 3, 8]])


@torch.no_grad()
def logits_of(model: AdaptedModel) -> torch.Tensor:
    found: torch.Tensor = model.model(input_ids=IDS, use_cache=False).logits
    return found


def measured(recipe: Recipe, folder: Path, kind: str, client_id: str) -> list[torch.Tensor]:
    """Return the logits of the models that ``evaluate_client`` measures after the last round."""
    strategy, clients, _, _ = build(recipe, folder / "clients")
    client = next(client for client in clients if client.client_id == client_id)
    state = load_checkpoint(folder / "checkpoints", about={})
    assert state is not None
    channel = build_channel(recipe)
    task = Task(state.round_number + 1, state.shared, LocalSettings(0, 0, 0.0))
    task = channel.unpack_task(channel.broadcast(task, {}).whole)
    seen: list[torch.Tensor] = []

    def look(model: AdaptedModel, *args: object, **kwargs: object) -> dict[str, float]:
        seen.append(logits_of(model))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "evaluate", look)
        evaluate_client(strategy, client, task, [kind])
    return seen


# The others meet all that these do: a tree of one's own, one graft, and a part of the experts.
LONG = ("two grafts", "local", "carved", "flex+hfedmoe")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.long) if k in LONG else k for k in KINDS]
)
def test_an_opened_model_is_what_the_run_measured(kind: str, tmp_path: Path) -> None:
    recipe = KINDS[kind]
    run_quickly(tmp_path, recipe)
    client = next(iter(prepared(recipe).federation.train))
    assert client in find_models(tmp_path)
    for name, own in (("global", None), ("personal", client)):
        (expected,) = measured(recipe, tmp_path, name, client)
        with open_model(read_state(tmp_path, client=own)) as opened:
            assert torch.equal(logits_of(opened.adapted), expected), name
            assert not torch.isnan(expected).any()


@pytest.mark.long
def test_a_client_that_chooses_anew_each_round_opens_with_what_it_trained_last(
    tmp_path: Path,
) -> None:
    run_quickly(tmp_path, ANEW)
    client = next(iter(prepared(ANEW).federation.train))
    state = read_state(tmp_path, client=client)
    assert state.held_experts is not None
    assert sum(map(len, state.held_experts.values())) == QUARTER
    lines = [line for line in MetricsLog(tmp_path / "metrics.jsonl") if line["kind"] == "client"]
    trained = next(line for line in lines if line["client"] == client)
    assert trained["client/budget_experts"] == QUARTER
    with open_model(state) as opened:
        held = {layer.name: tuple(layer.expert_ids) for layer in opened.adapted.view.layers}
        assert held == dict(state.held_experts)
        with_graft = logits_of(opened.adapted)
    assert not torch.equal(logits_of(opened.adapted), with_graft)
