"""A whole round of FLEx and of HFedMoE, masked and carved, on one tiny model of a family."""

from __future__ import annotations

from pathlib import Path

from orchard.client.client import Client
from orchard.client.store import ClientStore
from orchard.client.training import TrainingSettings
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.evaluation.quality import EvaluationSettings
from orchard.experts.grafting import GraftSettings
from orchard.experts.submodel_source import SubmodelSource
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.seeding import Seeds
from orchard.server.checkpoint import ServerState
from orchard.strategies.expert_names import Expert, expert_of
from orchard.strategies.flex import FlexSettings, flex
from orchard.strategies.hfedmoe import HfedmoeSettings, hfedmoe
from orchard.strategies.session import SubsetSettings
from orchard.strategies.strategy import Strategy, start_server, train_client, update_server
from orchard.trees import equal
from tiny_adapted import examples

_TRAINING = TrainingSettings(2, 1, "adamw", 0.0, 1.0, 0.0)
_ONE_STEP = LocalSettings(1, 0, 1e-2)


def check_rounds(model: AdaptedModel, lora: LoraSettings, path: str) -> None:
    """Play a round of each method, with one client that affords half of the experts.

    Args:
        model: With fresh adapters.
        lora: Where they are.
        path: The checkpoint of its base.
    """
    layers = model.view.layers
    num_experts = sum(layer.num_experts for layer in layers)
    # A router that scores a state of its own (Zaya) has no row that a gate could start as.
    rows = {layer.router_tensors()["weight"].shape[1] == layer.reads_width for layer in layers}
    gate = "router_row" if rows == {True} else "closed"
    graft = GraftSettings(rank=2, alpha=4.0, dropout=0.0, gate=gate)
    own = FlexSettings(graft, calibration_blocks=2, calibration_tokens=8)
    client, update, state = play(flex(Strategy(), own), model, lora, Path(path) / "flex")
    kept = client.store.load(before_round=2)
    assert kept is not None
    assert {name for name in kept.tensors if "graft" in name}
    assert not any("graft" in name for name in update.delta)
    assert moved_by(update)
    for mode in ("mask", "carve"):
        subset = SubsetSettings(mode=mode, cadence="round", scoring_batches=1)
        strategy = hfedmoe(Strategy(), HfedmoeSettings(subset, threshold=0.0))
        folder = Path(path) / mode
        _, update, state = play(strategy, model, lora, folder, budget=num_experts // 2)
        assert 0 < len(moved_by(update)) <= num_experts // 2
        assert not equal(state.shared, model.fresh)


def play(
    strategy: Strategy, model: AdaptedModel, lora: LoraSettings, folder: Path, *, budget: int = 0
) -> tuple[Client, Update, ServerState]:
    source = SubmodelSource(
        str(folder.parent), "float32", "cpu", lora, model.tokenizer, base_digest="", seed=0
    )
    client = Client(
        "north",
        model,
        examples(4),
        [""] * 4,
        [],
        [],
        [],
        ClientStore(folder, ""),
        _TRAINING,
        EvaluationSettings((), 1, 1),
        Seeds(0),
        budget_experts=budget or None,
        submodels=source,
    )
    state = start_server(strategy, model.fresh)
    update = train_client(strategy, client, Task(1, state.shared, _ONE_STEP))
    after = update_server(strategy, state, [update])
    model.load(model.fresh)
    return client, update, after


def moved_by(update: Update) -> set[Expert]:
    found = {expert_of(name) for name, delta in update.delta.items() if bool(delta.any())}
    return {expert for expert in found if expert is not None}
