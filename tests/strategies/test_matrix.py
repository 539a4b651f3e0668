"""Every method, and every pair that FLEx makes with another, through the same demands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from federations import COMBINATIONS, SHORT, build, has_budget, quick_recipe, tiny_recipe
from orchard.client.client import Client
from orchard.communication.messages import LocalSettings, Task, encode_update
from orchard.experiment.preparation import prepare_experiment
from orchard.recipe.options import Recipe
from orchard.server.admission import Admission
from orchard.server.checkpoint import ServerState
from orchard.strategies.strategy import (
    Strategy,
    evaluate_client,
    start_server,
    train_client,
    update_server,
)
from orchard.trees import digest, equal

PRIVATE = ("expert", "router", "graft", "gate", "mlp")
PRIVATE_WITH_BUDGET = ("graft", "subset", "usage", "importance")


def play_round(
    strategy: Strategy, clients: list[Client], state: ServerState
) -> tuple[ServerState, list[bytes]]:
    task = Task(state.round_number + 1, state.shared, LocalSettings(2, 0, 1e-3))
    updates = [train_client(strategy, client, task) for client in clients]
    for client, update in zip(clients, updates, strict=True):  # what is honest is let in
        name, number = client.client_id, task.round_number
        Admission().check(
            update, client_id=name, round_number=number, shared=state.shared, local={}
        )
    wire = [encode_update(update) for update in updates]
    return update_server(strategy, state, updates), wire


def check_method(recipe: Recipe, folder: Path, *, num_clients: int, num_again: int) -> None:
    """Play two rounds, and ``num_again`` of them again from the start."""
    method = recipe.strategy.name
    private = PRIVATE_WITH_BUDGET if has_budget(method) else PRIVATE
    ends: list[list[ServerState]] = []
    for attempt, num_rounds in (("first", 2), ("second", num_again)):
        strategy, clients, model, _ = build(recipe, folder / attempt)
        state = start_server(strategy, model.fresh)
        start, states = dict(state.shared), []
        for _ in range(num_rounds):
            state, wire = play_round(strategy, clients[:num_clients], state)
            states.append(state)
            for message in wire:
                header = message[8 : 8 + int.from_bytes(message[:8], "little")].lower()
                names = header.split(b'"__metadata__"')[0] + header.split(b"}}", 1)[-1]
                assert not any(word.encode() in names for word in private)
        assert digest(model.base_state) == model.base_digest
        assert state.round_number == num_rounds
        assert ("local" in method) == equal(start, state.shared)
        ends.append(states)
    assert equal(ends[0][num_again - 1].shared, ends[1][-1].shared)


@pytest.mark.parametrize("method", SHORT)
def test_rounds_keep_the_base_send_nothing_private_and_repeat_exactly(
    method: str, tmp_path: Path
) -> None:
    check_method(quick_recipe(method), tmp_path, num_clients=2, num_again=1)


@pytest.mark.long
@pytest.mark.parametrize("method", [name for name in COMBINATIONS if name not in SHORT])
def test_pairs_with_flex_do_too(method: str, tmp_path: Path) -> None:
    check_method(quick_recipe(method), tmp_path, num_clients=2, num_again=1)


@pytest.mark.long
@pytest.mark.parametrize("method", ["scaffold", "fedmoe", "flex+hfedmoe"])
def test_rounds_of_all_clients_on_the_whole_model_do_too(method: str, tmp_path: Path) -> None:
    check_method(tiny_recipe(method), tmp_path, num_clients=4, num_again=2)


@pytest.mark.parametrize("method", ["flex", "flex+fedadam", "flex+scaffold"])
def test_uplink_names_of_flex_are_attention_adapters_only(method: str, tmp_path: Path) -> None:
    strategy, clients, model, _ = build(quick_recipe(method), tmp_path)
    state = start_server(strategy, model.fresh)
    task = Task(1, state.shared, LocalSettings(1, 0, 1e-3))
    update = train_client(strategy, clients[0], task)
    assert update.delta.keys() <= {
        *model.adapter_names,
        *(f"control.{n}" for n in model.adapter_names),
    }
    assert all(".self_attn." in name for name in update.delta)
    kept = clients[0].store.load(before_round=2)
    assert kept is not None
    assert any(".graft." in name for name in kept.tensors)
    assert not any(".graft." in name for name in update.delta)


def test_fedavg_with_one_client_returns_that_clients_model(tmp_path: Path) -> None:
    strategy, clients, model, _ = build(quick_recipe("fedavg"), tmp_path)
    state = start_server(strategy, model.fresh)
    state, _ = play_round(strategy, clients[:1], state)
    local = model.read(model.adapter_names)
    for name, value in state.shared.items():
        torch.testing.assert_close(value, local[name], rtol=0, atol=1e-6)


def test_fedprox_without_pull_is_fedavg_and_a_strong_pull_moves_less(tmp_path: Path) -> None:
    moved = {}
    for name, recipe in {
        "fedavg": quick_recipe("fedavg"),
        "free": quick_recipe("fedprox", "strategy.prox_mu=0.0"),
        "pulled": quick_recipe(
            "fedprox", "strategy.prox_mu=1000.0", "client.optimizer=sgd", "client.max_grad_norm=0.0"
        ),
        "sgd": quick_recipe("fedavg", "client.optimizer=sgd", "client.max_grad_norm=0.0"),
    }.items():
        strategy, clients, model, _ = build(recipe, tmp_path / name)
        state = start_server(strategy, model.fresh)
        task = Task(1, state.shared, LocalSettings(4, 0, 1e-3))
        moved[name] = train_client(strategy, clients[0], task).delta
    assert all(
        torch.allclose(moved["fedavg"][n], moved["free"][n], atol=1e-7) for n in moved["free"]
    )
    norm = {
        name: sum(float(value.square().sum()) for value in delta.values())
        for name, delta in moved.items()
    }
    assert norm["pulled"] < 0.5 * norm["sgd"]


def test_scaffold_control_variates_follow_option_two_under_plain_sgd(tmp_path: Path) -> None:
    overrides = ("client.optimizer=sgd", "client.max_grad_norm=0.0")
    strategy, clients, model, _ = build(quick_recipe("scaffold", *overrides), tmp_path)
    state = start_server(strategy, model.fresh)
    lr, steps = 1e-2, 3
    for round_number in (1, 2):
        task = Task(round_number, state.shared, LocalSettings(steps, 0, lr))
        before = {
            client.client_id: client.store.load(before_round=round_number) for client in clients
        }
        updates = [train_client(strategy, client, task) for client in clients]
        for client, update in zip(clients, updates, strict=True):
            kept, after = before[client.client_id], client.store.load(before_round=round_number + 1)
            assert after is not None
            for name in model.adapter_names:
                key = f"control.{name}"
                own = torch.zeros_like(update.delta[name]) if kept is None else kept.tensors[key]
                expected = own - task.shared[key] - update.delta[name] / (steps * lr)
                torch.testing.assert_close(after.tensors[key], expected, rtol=1e-3, atol=1e-5)
        state = update_server(strategy, state, updates)
    mean_control = torch.stack(
        [
            kept.tensors[f"control.{model.adapter_names[1]}"]
            for kept in (client.store.load(before_round=3) for client in clients)
            if kept is not None
        ]
    ).mean(0)
    torch.testing.assert_close(
        state.shared[f"control.{model.adapter_names[1]}"], mean_control, rtol=1e-4, atol=1e-6
    )


def test_a_client_that_sat_out_keeps_its_graft_and_takes_the_new_global_values(
    tmp_path: Path,
) -> None:
    strategy, clients, model, _ = build(quick_recipe("flex"), tmp_path)
    state = start_server(strategy, model.fresh)
    state, _ = play_round(strategy, clients, state)
    kept = clients[0].store.load(before_round=2)
    assert kept is not None
    state, _ = play_round(strategy, clients[1:], state)
    again = clients[0].store.load(before_round=3)
    assert again is not None
    assert equal(kept.tensors, again.tensors)
    task = Task(3, state.shared, LocalSettings(1, 0, 1e-3))
    with strategy.prepare(clients[0], task) as plan:
        assert set(plan.personal) <= again.tensors.keys()
    before = train_client(strategy, clients[0], task)
    assert before.round_number == 3


def test_personal_tensors_survive_rounds_while_global_values_are_overwritten(
    tmp_path: Path,
) -> None:
    strategy, clients, model, _ = build(quick_recipe("flex"), tmp_path)
    state = start_server(strategy, model.fresh)
    state, _ = play_round(strategy, clients, state)
    first = clients[0].store.load(before_round=2)
    assert first is not None
    shifted = {name: value + 1 for name, value in state.shared.items()}
    task = Task(2, shifted, LocalSettings(1, 0, 1e-12))
    update = train_client(strategy, clients[0], task)
    second = clients[0].store.load(before_round=3)
    assert second is not None
    # At a vanishing learning rate nothing moves: what it trained from is what it was given.
    for name, value in first.tensors.items():
        torch.testing.assert_close(second.tensors[name], value, rtol=0, atol=1e-9)
    assert all(float(value.abs().max()) < 1e-5 for value in update.delta.values())


def test_flex_with_shut_gates_is_fedavg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchard.experts.grafting.CLOSED_BIAS", -1e4)
    ends = []
    for method in ("fedavg", "flex"):
        # Without clipping: a norm over more tensors, zeros though they are, rounds differently.
        recipe = quick_recipe(method, "client.max_grad_norm=0.0")
        strategy, clients, model, _ = build(recipe, tmp_path / method)
        state = start_server(strategy, model.fresh)
        for _ in range(2):
            state, _ = play_round(strategy, clients, state)
        ends.append(state.shared)
    assert equal(ends[0], ends[1])


def test_clients_with_different_data_choose_different_experts(tmp_path: Path) -> None:
    strategy, clients, model, _ = build(tiny_recipe("flex"), tmp_path)
    task = Task(1, start_server(strategy, model.fresh).shared, LocalSettings(1, 0, 1e-3))
    choices = []
    for client in clients:
        train_client(strategy, client, task)
        kept = client.store.load(before_round=2)
        assert kept is not None
        choices.append(
            tuple(int(kept.tensors[f"{layer.name}.graft.expert"]) for layer in model.view.layers)
        )
    assert len(set(choices)) > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("strategy.graft_experts=9",), "strategy.graft_experts must be in 1..8, got 9; "),
        (
            ("strategy.graft_experts=3", "strategy.graft_budget=1"),
            "strategy.graft_budget must be 0 or in 2..6, got 1; ",
        ),
        (
            ("strategy.graft_experts=3", "strategy.graft_budget=7"),
            "strategy.graft_budget must be 0 or in 2..6, got 7; ",
        ),
    ],
)
def test_grafts_that_do_not_fit_the_model_are_refused_before_it_is_loaded(
    overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("orchard.models.stored.loading.load_base")
    with pytest.raises(ValueError, match=f"^{message}"):
        prepare_experiment(quick_recipe("flex", *overrides))


def test_a_budget_of_grafts_is_shared_by_what_layers_miss(tmp_path: Path) -> None:
    recipe = quick_recipe("flex", "strategy.graft_experts=3", "strategy.graft_budget=4")
    strategy, (client, *_), model, _ = build(recipe, tmp_path)
    shared = start_server(strategy, model.fresh).shared
    metrics = []
    for round_number in (1, 2):
        task = Task(round_number, shared, LocalSettings(1, 0, 1e-3))
        metrics.append(train_client(strategy, client, task).metrics)
    kept = client.store.load(before_round=3)
    assert kept is not None
    layers = [layer.name for layer in model.view.layers]
    numbers = [kept.tensors[f"{name}.graft.expert"].numel() for name in layers]
    assert len(layers) <= sum(numbers) <= 4
    assert all(1 <= number <= 3 for number in numbers)
    for name, number in zip(layers, numbers, strict=True):
        router = kept.tensors.get(f"{name}.graft.router.weight")
        assert (router is None) == (number == 1)
        assert router is None or len(router) == number
        # What the search found is told in the round in which it searched.
        assert metrics[0][f"client/graft_loss_bound_{name}"] > 0
        assert metrics[0][f"client/graft_loss_{name}"] > 0
        assert f"client/graft_loss_{name}" not in metrics[1]


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy.graft_kind=dense",),
        ("strategy.graft_mix=convex",),
        ("strategy.graft_gate=router_row",),
        ("strategy.graft_gate=none",),
        ("strategy.graft_choice=random",),
        ("strategy.graft_experts=3",),
        ("strategy.graft_experts=3", "strategy.graft_kind=dense", "strategy.graft_mix=convex"),
        ("strategy.graft_experts=2", "strategy.graft_choice=random"),
        ("strategy.graft_experts=3", "strategy.graft_budget=4"),
        ("strategy.graft_experts=5", "strategy.graft_max_sets=8", "strategy.graft_gate=router_row"),
        ("strategy.graft_loss=fitted",),
        ("strategy.calibration=majority_category",),
        ("model.dtype=bfloat16",),
        ("model.lora_targets=q_proj,o_proj,router,experts",),
    ],
)
def test_every_option_of_flex_trains_and_leaves_the_base_alone(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    strategy, clients, model, _ = build(quick_recipe("flex", *overrides), tmp_path)
    state = start_server(strategy, model.fresh)
    start = dict(state.shared)
    state, _ = play_round(strategy, clients[:1], state)
    assert not equal(start, state.shared)
    assert digest(model.base_state) == model.base_digest


def test_evaluation_tells_base_global_and_personal_apart(tmp_path: Path) -> None:
    recipe = tiny_recipe("flex", "evaluation.metrics=loss")
    strategy, clients, model, _ = build(recipe, tmp_path)
    state = start_server(strategy, model.fresh)
    for round_number in (1, 2):
        task = Task(round_number, state.shared, LocalSettings(8, 0, 5e-3))
        updates = [train_client(strategy, client, task) for client in clients]
        state = update_server(strategy, state, updates)
    task = Task(3, state.shared, LocalSettings(0, 0, 0.0))
    metrics = evaluate_client(strategy, clients[0], task, ("base", "global", "personal"))
    assert metrics["personal/loss"] < metrics["global/loss"] < metrics["base/loss"]
    # Evaluation leaves nothing behind.
    assert evaluate_client(strategy, clients[0], task, ("base", "global", "personal")) == metrics


def test_personal_model_of_a_method_that_keeps_nothing_is_the_global_one(tmp_path: Path) -> None:
    recipe = quick_recipe("fedavg", "evaluation.metrics=loss")
    strategy, clients, model, _ = build(recipe, tmp_path)
    state, _ = play_round(strategy, clients, start_server(strategy, model.fresh))
    task = Task(2, state.shared, LocalSettings(0, 0, 0.0))
    metrics = evaluate_client(strategy, clients[0], task, ("global", "personal"))
    assert metrics["personal/loss"] == metrics["global/loss"]


def test_a_round_in_which_nobody_trained_does_not_count(tmp_path: Path) -> None:
    strategy, _, model, _ = build(quick_recipe("fedavg"), tmp_path)
    with pytest.raises(ValueError, match="at least one update"):
        update_server(strategy, start_server(strategy, model.fresh), [])


def test_updates_with_unknown_names_are_refused(tmp_path: Path) -> None:
    strategy, clients, model, _ = build(quick_recipe("fedavg"), tmp_path)
    state = start_server(strategy, model.fresh)
    update = train_client(strategy, clients[0], Task(1, state.shared, LocalSettings(1, 0, 1e-3)))
    name = next(iter(state.shared))
    fewer = ServerState(0, {n: t for n, t in state.shared.items() if n != name})
    with pytest.raises(ValueError, match="names of the global tree"):
        update_server(strategy, fewer, [update])


def test_grafts_that_always_count_fully_harm_what_the_base_knows(tmp_path: Path) -> None:
    """The sign of FLEx's ablation without gates: a full extra expert in every layer."""
    losses = {}
    for gate in ("closed", "none"):
        recipe = tiny_recipe("flex", f"strategy.graft_gate={gate}", "evaluation.metrics=loss")
        strategy, clients, model, _ = build(recipe, tmp_path / gate)
        task = Task(1, start_server(strategy, model.fresh).shared, LocalSettings(0, 0, 0.0))
        metrics = evaluate_client(strategy, clients[0], task, ("base", "personal"))
        losses[gate] = metrics["personal/loss"] - metrics["base/loss"]
    assert losses["none"] > 0.25
    assert abs(losses["closed"]) < losses["none"] / 5
