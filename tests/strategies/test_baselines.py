"""The methods that HFedMoE is compared with, under its budgets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from federations import ALL_EXPERTS, BUDGETS, NUM_LAYERS, QUARTER, build, quick_recipe, run_quickly
from orchard.client.client import Client
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.experiment.methods import METHODS, build_strategy
from orchard.experts.observation import LayerPass, watch_routing
from orchard.models.view.detection import view_moe
from orchard.recipe.options import Recipe
from orchard.results import MetricsLog
from orchard.server.checkpoint import ServerState
from orchard.strategies.expert_names import Expert, expert_of, router_row_of
from orchard.strategies.seermoe import routing_entropy
from orchard.strategies.strategy import (
    Strategy,
    evaluate_client,
    start_server,
    train_client,
    update_server,
)
from orchard.trees import digest, equal
from tiny_models import FAMILIES, batch_of

SUBSETS = ["fedavg_random", "pflmoe", "fedmoe", "seermoe"]
BASELINES = ["fedavg_dropout", *SUBSETS]


class Federation:
    """A tiny federation and what its clients sent, round by round."""

    def __init__(self, folder: Path, recipe: Recipe, *, steps: int = 2, lr: float = 1e-3) -> None:
        self.strategy, self.clients, self.model, _ = build(recipe, folder)
        self.state = start_server(self.strategy, self.model.fresh)
        self.settings = LocalSettings(steps, 0, lr)
        self.rounds: list[list[Update]] = []

    def play(self, num_rounds: int = 1) -> list[Update]:
        for _ in range(num_rounds):
            task = Task(self.state.round_number + 1, self.state.shared, self.settings)
            updates = [train_client(self.strategy, client, task) for client in self.clients]
            self.rounds.append(updates)
            self.state = update_server(self.strategy, self.state, updates)
        return self.rounds[-1]


def sent_experts(update: Update) -> set[Expert]:
    return {expert for expert in map(expert_of, update.delta) if expert is not None}


def moved_experts(update: Update) -> set[Expert]:
    moved = {expert_of(name) for name, delta in update.delta.items() if bool(delta.any())}
    return {expert for expert in moved if expert is not None}


def all_of(federation: Federation) -> set[Expert]:
    return {e for e in map(expert_of, federation.model.adapter_names) if e is not None}


def loss_of(updates: list[Update]) -> float:
    losses = [u.metrics["client/train_loss"] for u in updates if "client/train_loss" in u.metrics]
    return sum(losses) / len(losses)


def test_the_baselines_are_all_methods_with_budgets_but_hfedmoe() -> None:
    assert {*BASELINES, "hfedmoe"} == {n for n, m in METHODS.items() if m.part == "budget"}


@pytest.mark.parametrize("method", SUBSETS)
def test_clients_move_no_more_experts_than_they_afford(method: str, tmp_path: Path) -> None:
    federation = Federation(tmp_path, quick_recipe(method))
    for updates in (federation.play(), federation.play()):
        for client, update in zip(federation.clients, updates, strict=True):
            budget = client.budget_experts
            assert budget is not None
            moved = moved_experts(update)
            assert NUM_LAYERS <= len(moved) <= budget
            # Two steps of four examples need not use all that may learn.
            assert {layer for layer, _ in moved} == {f"layers.{i}" for i in range(NUM_LAYERS)}
            assert update.metrics["client/budget_experts"] == budget
            assert update.metrics["client/active_experts"] <= budget
            assert len(moved) <= update.metrics["client/trained_experts"] <= budget


@pytest.mark.parametrize(
    "method",
    [
        "fedavg_dropout",
        "pflmoe",
        "seermoe",
        *(pytest.param(m, marks=pytest.mark.long) for m in ("fedavg_random", "fedmoe")),
    ],
)
def test_baselines_learn_and_keep_the_base_bit_for_bit(method: str, tmp_path: Path) -> None:
    federation = Federation(tmp_path, quick_recipe(method), steps=6, lr=5e-3)
    del federation.clients[2:]
    first = loss_of(federation.play())
    assert loss_of(federation.play(2)) < 0.9 * first
    assert digest(federation.model.base_state) == federation.model.base_digest


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("fedavg_dropout", ()),
        ("fedavg_random", ()),
        ("fedmoe", ()),
        ("seermoe", ("strategy.entropy_coefficient=0.0",)),
        ("hfedmoe", ("selection.threshold=0.0", "selection.router=examples")),
    ],
)
def test_with_a_budget_for_everything_it_is_fedavg(
    method: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    # Weight decay moves an expert that no token chose: without a limit it has to move here too.
    common = ("client.weight_decay=0.1", "model.full_targets=", BUDGETS[0])
    ends = []
    for name, own in (("fedavg", ()), (method, ("client.budget=", *overrides))):
        federation = Federation(tmp_path / name, quick_recipe(name, *own, *common))
        del federation.clients[2:]
        federation.play()
        ends.append(federation.state.shared)
    assert equal(*ends)


def test_pflmoe_with_a_budget_for_everything_sends_fedavgs_deltas_of_what_it_used(
    tmp_path: Path,
) -> None:
    fedavg = Federation(tmp_path / "fedavg", quick_recipe("fedavg", BUDGETS[0])).play()
    pflmoe = Federation(tmp_path / "pflmoe", quick_recipe("pflmoe", "client.budget=")).play()
    for whole, part in zip(fedavg, pflmoe, strict=True):
        assert equal(part.delta, {name: whole.delta[name] for name in part.delta})
        assert all(not whole.delta[n].any() for n in whole.delta.keys() - part.delta.keys())


# FedAvg with drop-outs


def test_a_client_that_cannot_afford_all_experts_sends_nothing_and_does_not_count(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path / "all", quick_recipe("fedavg_dropout"))
    updates = federation.play()
    assert [len(update.delta) > 0 for update in updates] == [False, True, False, True]
    assert [u.metrics["client/dropped_out"] for u in updates] == [1.0, 0.0, 1.0, 0.0]
    for update in updates[::2]:
        assert update.metrics["client/train_seconds"] == 0.0
        assert "client/train_loss" not in update.metrics
    others = Federation(tmp_path / "others", quick_recipe("fedavg", BUDGETS[0]))
    others.clients = others.clients[1::2]
    others.play()
    assert equal(federation.state.shared, others.state.shared)


def test_a_client_that_drops_out_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation(tmp_path, quick_recipe("flex+fedavg_dropout", "client.budget=50%"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it trained")

    monkeypatch.setattr("orchard.strategies.strategy.train", refuse)
    federation.play()
    assert all(client.store.load(before_round=2) is None for client in federation.clients)


@pytest.mark.parametrize("method", ["fedavg_dropout", "fedavg_dropout+fedadam"])
def test_a_round_in_which_everybody_drops_out_counts_and_changes_nothing(
    method: str, tmp_path: Path
) -> None:
    federation = Federation(tmp_path, quick_recipe(method, "client.budget=50%"))
    before = dict(federation.state.shared)
    federation.play(2)
    assert federation.state.round_number == 2
    assert equal(before, federation.state.shared)


def test_a_run_in_which_everybody_drops_out_ends_with_the_base(tmp_path: Path) -> None:
    recipe = quick_recipe(
        "fedavg_dropout",
        "client.budget=50%",
        "evaluation.models=base,global,local,personal",
        "evaluation.metrics=loss",
    )
    result = run_quickly(tmp_path, recipe)
    losses = {model: values["loss"] for model, values in result["metrics"].items()}
    assert losses["base"] == losses["global"] == losses["local"] == losses["personal"]
    assert result["train_loss_per_round"] == [None, None]
    lines = MetricsLog(tmp_path / "metrics.jsonl").read()
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [line["round/num_dropped_out"] for line in rounds] == [4, 4]
    assert all("round/train_loss" not in line for line in rounds)


def test_the_training_loss_of_a_round_is_of_the_clients_that_trained(tmp_path: Path) -> None:
    run_quickly(tmp_path, quick_recipe("fedavg_dropout", "server.rounds=1"))
    lines = MetricsLog(tmp_path / "metrics.jsonl").read()
    losses = [line["client/train_loss"] for line in lines if "client/train_loss" in line]
    (summary,) = [line for line in lines if line["kind"] == "round"]
    assert len(losses) == 2
    assert summary["round/train_loss"] == pytest.approx(sum(losses) / 2)
    assert (summary["round/num_clients"], summary["round/num_dropped_out"]) == (4, 2)


def test_a_client_that_dropped_out_can_be_evaluated(tmp_path: Path) -> None:
    recipe = quick_recipe("fedavg_dropout", "evaluation.metrics=loss")
    federation = Federation(tmp_path, recipe, steps=6, lr=5e-3)
    federation.play()
    task = Task(2, federation.state.shared, LocalSettings(0, 0, 0.0))
    models = ("base", "global", "personal")
    found = evaluate_client(federation.strategy, federation.clients[0], task, models)
    assert found["personal/loss"] == found["global/loss"] < found["base/loss"]


# FedAvg with random experts


@pytest.mark.parametrize("mode", ["mask", "carve"])
def test_random_experts_are_drawn_each_round_and_all_are_sent(mode: str, tmp_path: Path) -> None:
    federation = Federation(tmp_path, quick_recipe("fedavg_random", f"selection.mode={mode}"))
    first, second = federation.play()[0], federation.play()[0]
    for update in (first, second):
        assert update.delta.keys() == set(federation.model.adapter_names)
        still = all_of(federation) - moved_experts(update)
        assert len(still) >= ALL_EXPERTS - QUARTER
        assert len({*update.weight.values()}) == 1
    assert moved_experts(first) != moved_experts(second)


def test_clients_draw_different_experts(tmp_path: Path) -> None:
    updates = Federation(tmp_path, quick_recipe("fedavg_random", "client.budget=25%")).play()
    assert len({frozenset(moved_experts(update)) for update in updates}) == 4


# PFL-MoE


def test_pflmoe_sends_the_experts_that_it_trained(tmp_path: Path) -> None:
    federation = Federation(tmp_path, quick_recipe("pflmoe"))
    updates = federation.play()
    assert any(len(sent_experts(update)) < ALL_EXPERTS for update in updates)
    for update in updates:
        assert moved_experts(update) <= sent_experts(update)
        assert len(sent_experts(update)) == update.metrics["client/trained_experts"]
        rest = [name for name in federation.model.adapter_names if expert_of(name) is None]
        assert update.delta.keys() >= set(rest)
        assert len({*update.weight.values()}) == 1


# FedMoE


@pytest.mark.parametrize("targets", ["lora", "full"])
def test_fedmoe_trains_and_sends_one_submodel_in_every_round(targets: str, tmp_path: Path) -> None:
    full = ("model.lora_targets=q_proj", "model.full_targets=experts,router")
    recipe = quick_recipe("fedmoe", *(full if targets == "full" else ()))
    federation = Federation(tmp_path, recipe)
    federation.play(2)
    names = federation.model.adapter_names
    rows = {row for row in map(router_row_of, names) if row is not None}
    assert rows == all_of(federation)
    for position, client in enumerate(federation.clients):
        first, second = (updates[position] for updates in federation.rounds)
        experts = sent_experts(first)
        assert len(experts) == client.budget_experts
        for update in (first, second):
            assert sent_experts(update) == experts
            assert {r for r in map(router_row_of, update.delta) if r is not None} == experts
        kept = client.store.load(before_round=3)
        assert kept is not None
        marked = {
            (name.removeprefix("subset."), expert)
            for name, mask_E in kept.tensors.items()
            for expert in mask_E.nonzero().flatten().tolist()
        }
        assert marked == experts


def test_a_row_of_the_router_outside_the_submodel_stays(tmp_path: Path) -> None:
    full = ("model.lora_targets=q_proj", "model.full_targets=experts,router")
    recipe = quick_recipe("fedmoe", *full, "client.weight_decay=0.1")
    strategy, clients, model, _ = build(recipe, tmp_path)
    state = start_server(strategy, model.fresh)
    update = train_client(strategy, clients[0], Task(1, state.shared, LocalSettings(3, 0, 1e-2)))
    local = model.read(model.adapter_names)
    rows = {name for name in local if router_row_of(name) is not None}
    assert {n for n in rows if not torch.equal(local[n], state.shared[n])} == rows & {*update.delta}


def test_modules_come_from_those_who_hold_them(tmp_path: Path) -> None:
    federation = Federation(tmp_path, quick_recipe("fedmoe", "client.budget=6, 5, 4, 3"))
    before = dict(federation.state.shared)
    updates = federation.play()
    holders = {e: [u for u in updates if e in sent_experts(u)] for e in all_of(federation)}
    assert {0, 1} <= {len(clients) for clients in holders.values()}
    for name, old in before.items():
        expert = expert_of(name) or router_row_of(name)
        if expert is None:
            continue
        new = federation.state.shared[name]
        if not holders[expert]:
            assert torch.equal(new, old)
        if len(holders[expert]) == 1:
            torch.testing.assert_close(new, old + holders[expert][0].delta[name])


# SEER-MoE


def test_seermoe_sends_what_it_kept_and_whole_routers(tmp_path: Path) -> None:
    federation = Federation(tmp_path, quick_recipe("seermoe"))
    federation.play(2)
    for position, client in enumerate(federation.clients):
        first, second = (updates[position] for updates in federation.rounds)
        assert len(sent_experts(first)) == client.budget_experts
        assert sent_experts(first) == sent_experts(second)
        assert {r for r in map(router_row_of, first.delta) if r} == all_of(federation)


def test_the_entropy_term_makes_routers_sharper(tmp_path: Path) -> None:
    entropies = {}
    for coefficient in (0.0, 2.0):
        recipe = quick_recipe("seermoe", f"strategy.entropy_coefficient={coefficient}")
        federation = Federation(tmp_path / str(coefficient), recipe, steps=6, lr=5e-3)
        del federation.clients[1:]
        updates = federation.play(2)
        entropies[coefficient] = [u.metrics["client/router_entropy"] for u in updates]
        assert all(u.metrics["client/train_loss"] < 10 for u in updates)
    assert all(a < 0.95 * b for a, b in zip(entropies[2.0], entropies[0.0], strict=True))


def test_the_entropy_counts_once_per_step(tmp_path: Path) -> None:
    """Micro-batches of one length give the gradient of their batch."""
    deltas = []
    for size, accumulation in ((4, 1), (2, 2)):
        overrides = (
            f"client.batch_size={size}",
            f"client.grad_accumulation={accumulation}",
            "strategy.entropy_coefficient=100.0",
            "client.optimizer=sgd",
            "client.max_grad_norm=0.0",
            "client.budget=",
        )
        strategy, clients, model, _ = build(
            quick_recipe("seermoe", *overrides), tmp_path / str(size)
        )
        client = _with_one_length(clients[0])
        state: ServerState = start_server(strategy, model.fresh)
        task = Task(1, state.shared, LocalSettings(1, 0, 1e-3))
        deltas.append(train_client(strategy, client, task).delta)
    for name, delta in deltas[0].items():
        torch.testing.assert_close(delta, deltas[1][name], rtol=1e-3, atol=1e-7)


def _with_one_length(client: Client) -> Client:
    from dataclasses import replace

    lengths = [len(example.input_ids) for example in client.train]
    common = max(set(lengths), key=lengths.count)
    same = [example for example in client.train if len(example.input_ids) == common]
    return replace(client, train=same[:4], categories=client.categories[:4])


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "granitemoe", "deepseek_moe_16b"])
def test_the_entropys_gradient_reaches_a_router_through_its_softmax_alone(family: str) -> None:
    model = FAMILIES[family]()
    view, batch = view_moe(model), batch_of(model, num_padding=2)
    model.requires_grad_(True)
    layer = view.layers[-1]
    inputs: list[torch.Tensor] = []
    handle = layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    seen: list[tuple[LayerPass, ...]] = []
    with watch_routing(view, seen.append, keep_graph=True):
        model(**batch)
    handle.remove()
    routing_entropy(seen[0]).backward()

    weight = layer.router_tensors()["weight"]
    own = weight.detach().clone().requires_grad_(True)
    x_TD = inputs[0].reshape(-1, own.shape[-1])[batch["attention_mask"].flatten().bool()]
    log_TE = functional.linear(x_TD, own).log_softmax(dim=-1)
    entropy = -(log_TE.exp() * log_TE).sum(dim=-1).mean() / len(view.layers)
    entropy.backward()
    assert own.grad is not None
    assert weight.grad is not None
    assert float(own.grad.abs().max()) > 1e-6
    torch.testing.assert_close(weight.grad, own.grad, rtol=1e-4, atol=1e-7)
    # Nothing after the last router has a part in it.
    for tensor in layer.storage.parameters():
        assert tensor.grad is None or not tensor.grad.any()


def test_routing_entropy_of_certain_and_undecided_tokens() -> None:
    def layer(*rows: list[float]) -> LayerPass:
        p_TE = torch.tensor(rows, requires_grad=True)
        return LayerPass(p_TE, torch.zeros(len(rows), 1, dtype=torch.int64), torch.arange(2))

    sure, open_ = [1.0, 0.0, 0.0, 0.0], [0.25] * 4
    log_4 = float(torch.log(torch.tensor(4.0)))
    assert float(routing_entropy((layer(sure, sure),)).detach()) == 0.0
    mixed = (layer(sure, open_), layer(open_, open_))
    entropy = routing_entropy(mixed)
    assert float(entropy.detach()) == pytest.approx(0.75 * log_4)
    entropy.backward()
    assert all(bool(each.probabilities_TE.grad.isfinite().all()) for each in mixed)  # type: ignore[union-attr]


# Options


def test_methods_that_choose_once_a_round_need_no_cadence_to_carve(tmp_path: Path) -> None:
    for method in SUBSETS:
        strategy, clients, _, _ = build(
            quick_recipe(method, "selection.mode=carve"), tmp_path / method
        )
        assert isinstance(strategy, Strategy)
        assert clients[0].budget_experts == QUARTER


@pytest.mark.long
def test_grafts_go_with_every_way_to_carve(tmp_path: Path) -> None:
    for method in SUBSETS:
        recipe = quick_recipe(f"flex+{method}", "selection.mode=carve")
        federation = Federation(tmp_path / method, recipe)
        del federation.clients[1:]
        (update,) = federation.play()
        assert not any("graft" in name for name in update.delta)
        kept = federation.clients[0].store.load(before_round=2)
        assert kept is not None
        assert any(".graft." in name for name in kept.tensors)


def test_two_ways_to_fit_a_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="one way to fit a budget"):
        build_strategy(quick_recipe("fedmoe+pflmoe"), num_clients=4)
