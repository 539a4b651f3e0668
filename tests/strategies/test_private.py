"""What clients train apart from what they send: Ditto, fine-tuning, Orchard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from federations import build, quick_recipe
from orchard.communication.messages import LocalSettings, Task
from orchard.engine.simulator import Schedule
from orchard.experiment.methods import check_strategy
from orchard.experiment.preparation import prepare_experiment
from orchard.strategies.strategy import Strategy, evaluate_client, start_server, train_client
from orchard.trees import Tree, equal

RATE = 1e-2


def sent_and_kept(folder: Path, method: str, *overrides: str, steps: int = 3) -> tuple[Tree, Tree]:
    strategy, (client, *_), model, _ = build(quick_recipe(method, *overrides), folder)
    shared = start_server(strategy, model.fresh).shared
    update = train_client(strategy, client, Task(1, shared, LocalSettings(steps, 0, RATE)))
    kept = client.store.load(before_round=2)
    return update.delta, {} if kept is None else kept.tensors


def distance(kept: Tree, start: Tree) -> float:
    return sum(float((kept[name] - start[name]).square().sum()) for name in kept)


def test_ditto_shares_what_fedavg_shares_and_pulls_its_own_model(tmp_path: Path) -> None:
    plain, _ = sent_and_kept(tmp_path / "fedavg", "fedavg")
    own = {}
    for strength in ("0.0", "50.0"):
        sent, own[strength] = sent_and_kept(
            tmp_path / strength,
            "ditto",
            f"strategy.ditto_lambda={strength}",
            "client.optimizer=sgd",
            "client.max_grad_norm=0.0",
        )
        assert own[strength].keys() == plain.keys() == sent.keys()
    _, _, model, _ = build(quick_recipe("fedavg"), tmp_path / "start")
    moved = {strength: distance(kept, model.fresh) for strength, kept in own.items()}
    assert moved["50.0"] < 0.5 * moved["0.0"]
    sent, _ = sent_and_kept(tmp_path / "ditto", "ditto")
    assert equal(sent, plain)


def test_fine_tuning_starts_at_the_shared_model_and_sends_nothing(tmp_path: Path) -> None:
    recipe = quick_recipe("finetune", "server.rounds=3", "evaluation.metrics=loss")
    strategy, (client, *_), model, _ = build(recipe, tmp_path)
    shared = {
        name: value + 0.01 for name, value in start_server(strategy, model.fresh).shared.items()
    }
    federated = train_client(strategy, client, Task(2, shared, LocalSettings(1, 0, RATE)))
    assert federated.delta.keys() == shared.keys()
    assert client.store.load(before_round=3) is None
    # At no rate nothing moves: what is kept is where it starts.
    last = train_client(strategy, client, Task(3, shared, LocalSettings(1, 0, 1e-12)))
    assert not last.delta
    kept = client.store.load(before_round=4)
    assert kept is not None
    for name, value in shared.items():
        torch.testing.assert_close(kept.tensors[name], value, rtol=0, atol=1e-9)
    later = {name: value + 1 for name, value in shared.items()}
    task = Task(4, later, LocalSettings(0, 0, 0.0))
    values = [
        evaluate_client(strategy, client, Task(4, tree, task.settings), {"personal"})
        for tree in (shared, later)
    ]
    assert values[0] == values[1]


def test_the_rate_of_fine_tuning_begins_anew() -> None:
    schedule = Schedule(6, 0, 1, 0, 1.0, 0.0, True, 0, (), final_rounds=2)
    rates = [schedule.local(number).learning_rate for number in range(1, 7)]
    assert rates == pytest.approx([1, 0.853553, 0.5, 0.146447, 1, 0.5], abs=1e-6)


def losses(strategy: Strategy, folder: Path, rate: float) -> tuple[dict[str, float], Tree, Tree]:
    own = ("evaluation.metrics=loss", "strategy.graft_gate=router_row", "strategy.judged_below=999")
    recipe = quick_recipe("orchard", *own)
    strategy, (client, *_), model, _ = build(recipe, folder)
    shared = start_server(strategy, model.fresh).shared
    update = train_client(strategy, client, Task(1, shared, LocalSettings(3, 0, rate)))
    measured = evaluate_client(
        strategy, client, Task(2, shared, LocalSettings(0, 0, 0.0)), {"global", "personal"}
    )
    kept = client.store.load(before_round=2)
    assert kept is not None
    return {**update.metrics, **measured}, update.delta, kept.tensors


def test_orchard_shares_what_fedavg_shares_and_keeps_no_graft_that_does_not_help_few_rows(
    tmp_path: Path,
) -> None:
    plain, _ = sent_and_kept(tmp_path / "fedavg", "fedavg")
    found, sent, kept = losses(Strategy(), tmp_path / "good", RATE)
    assert equal(sent, plain)
    assert all(".graft." in name for name in kept)
    assert found["client/own_is_trusted"] == 1.0
    assert found["client/own_judged_loss"] < found["client/shared_judged_loss"]
    assert found["personal/loss"] < found["global/loss"]
    # A rate at which every move harms: the client has the shared model, bit for bit.
    found, _, _ = losses(Strategy(), tmp_path / "bad", 3.0)
    assert found["client/own_is_trusted"] == found["client/own_share"] == 0.0
    assert found["personal/loss"] == found["global/loss"]


def test_orchard_is_flex_with_a_difference_graft_where_rows_are_enough(tmp_path: Path) -> None:
    _, (client, *_), _, _ = build(quick_recipe("flex"), tmp_path / "rows")
    number = len(client.train)
    flex = sent_and_kept(tmp_path / "flex", "flex", "strategy.graft_mix=difference")
    enough, few = (
        sent_and_kept(tmp_path / f"{below}", "orchard", f"strategy.judged_below={below}")
        for below in (number, number + 1)
    )
    assert all(equal(own, other) for own, other in zip(enough, flex, strict=True))
    assert not equal(few[0], enough[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("strategy.finetune_rounds=2",), r"strategy.finetune_rounds must be in 1\.\.1 "),
        (
            ("server.clients_per_round=2",),
            "server.clients_per_round must be 0 with finetune, got 2",
        ),
    ],
)
def test_fine_tuning_that_cannot_be_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_experiment(quick_recipe("finetune", *overrides))


@pytest.mark.parametrize(
    "name", ["ditto+flex", "orchard+hfedmoe", "local+finetune", "ditto+orchard"]
)
def test_one_kind_of_own_model_at_a_time(name: str) -> None:
    with pytest.raises(ValueError, match=r"^strategy.name must (not join|have one)"):
        check_strategy(name)
