"""Names divided by pattern: what is sent, what is kept, what stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from federations import build, quick_recipe
from orchard.communication.messages import LocalSettings, Task
from orchard.experiment.preparation import prepare_experiment
from orchard.strategies.strategy import evaluate_client, start_server, train_client, update_server
from orchard.trees import equal


def test_every_name_is_sent_or_kept_or_stays(tmp_path: Path) -> None:
    recipe = quick_recipe(
        "fedavg", "strategy.shared=*.q_proj.*", "strategy.kept=*lora_B", "evaluation.metrics=loss"
    )
    strategy, clients, model, _ = build(recipe, tmp_path)
    state = start_server(strategy, model.fresh)
    names = set(model.adapter_names)
    sent = {name for name in names if ".q_proj." in name and name.endswith("lora_A")}
    kept = {name for name in names if name.endswith("lora_B")}
    assert state.shared.keys() == sent
    for _ in range(2):  # B is zero at first, so that A has no gradient in the first step
        task = Task(state.round_number + 1, state.shared, LocalSettings(2, 0, 1e-2))
        updates = [train_client(strategy, client, task) for client in clients[:2]]
        assert all(update.delta.keys() == sent for update in updates)
        state = update_server(strategy, state, updates)
    own = [client.store.load(before_round=3) for client in clients[:2]]
    assert own[0] is not None
    assert own[1] is not None
    assert own[0].tensors.keys() == own[1].tensors.keys() == kept
    assert not equal(own[0].tensors, own[1].tensors)
    assert not any(torch.equal(state.shared[name], model.fresh[name]) for name in sent)
    after = Task(3, state.shared, LocalSettings(0, 0, 0.0))
    measured = evaluate_client(strategy, clients[0], after, {"global", "personal"})
    assert measured["personal/loss"] < measured["global/loss"]
    stays = names - sent - kept
    assert stays
    assert equal(model.read(stays), {name: model.fresh[name] for name in stays})


def test_in_turn_the_first_steps_move_what_is_kept_and_the_others_what_is_sent(
    tmp_path: Path,
) -> None:
    found = {}
    for steps in (1, 3):
        overrides = ("strategy.kept=*.v_proj.lora_B", "strategy.kept_steps=1", "client.steps=3")
        strategy, (client, *_), model, _ = build(
            quick_recipe("fedavg", *overrides), tmp_path / f"{steps}"
        )
        shared = start_server(strategy, model.fresh).shared
        update = train_client(strategy, client, Task(1, shared, LocalSettings(steps, 0, 1e-2)))
        kept = client.store.load(before_round=2)
        assert kept is not None
        found[steps] = kept.tensors
        moved = [name for name, value in update.delta.items() if bool(value.any())]
        assert bool(moved) == (steps == 3)
    assert equal(found[1], found[3])
    assert all(bool(value.any()) for value in found[1].values())


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("fedavg", ("strategy.kept=*.nothing",), r"strategy.kept must fit names .* got \*.nothing"),
        ("fedavg", ("strategy.shared=x*",), r"strategy.shared must fit names .* got x\*"),
        ("fedavg", ("strategy.kept=*",), "must leave something to send"),
        ("hfedmoe", ("strategy.kept=*lora_B",), "strategy.kept must be empty with hfedmoe"),
        (
            "fedavg",
            ("strategy.kept=*lora_B", "strategy.kept_steps=2"),
            r"strategy.kept_steps must be in 0\.\.1 ",
        ),
        (
            "local",
            ("strategy.kept=*lora_B", "strategy.kept_steps=1"),
            "strategy.kept_steps must be 0 where nothing",
        ),
    ],
)
def test_a_split_that_cannot_be_is_refused_before_the_model_is_loaded(
    method: str, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("orchard.models.stored.loading.load_base")
    with pytest.raises(ValueError, match=message):
        prepare_experiment(quick_recipe(method, *overrides))


def test_the_server_holds_what_is_sent_with_any_optimizer(tmp_path: Path) -> None:
    for method in ("fedadam", "scaffold", "flex+fedavgm"):
        strategy, _, model, _ = build(
            quick_recipe(method, "strategy.kept=*v_proj*"), tmp_path / method
        )
        shared = start_server(strategy, model.fresh).shared
        assert shared
        assert not any("v_proj" in name for name in shared)
