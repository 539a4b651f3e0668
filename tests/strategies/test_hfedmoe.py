from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from federations import (
    ALL_EXPERTS,
    BUDGETS,
    NUM_LAYERS,
    QUARTER,
    build,
    quick_recipe,
    short_first,
    tiny_recipe,
)
from orchard.client.client import Client
from orchard.client.training import TrainingReport
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.models.trainable.adapters import AdaptedModel
from orchard.recipe.options import Recipe
from orchard.server.checkpoint import ServerState
from orchard.strategies.expert_names import Expert, expert_of, is_router, router_row_of
from orchard.strategies.hfedmoe import HfedmoeSettings, hfedmoe
from orchard.strategies.session import CADENCES, RANKS, Session
from orchard.strategies.strategy import (
    Plan,
    Strategy,
    Trained,
    start_server,
    train_client,
    update_server,
)
from orchard.strategies.subset import layer_values, marked
from orchard.trees import digest, equal

LORA: tuple[str, ...] = ()
FULL = ("model.lora_targets=q_proj", "model.full_targets=experts,router", "model.dtype=float32")
FIRST = LocalSettings(2, 0, 1e-3)


def play(recipe: Recipe, folder: Path, settings: LocalSettings = FIRST) -> list[Update]:
    strategy, clients, model, _ = build(recipe, folder)
    state = start_server(strategy, model.fresh)
    return [train_client(strategy, client, Task(1, state.shared, settings)) for client in clients]


def moved(update: Update) -> set[Expert]:
    found = {expert_of(name) for name, delta in update.delta.items() if bool(delta.any())}
    return {expert for expert in found if expert is not None}


def sent(update: Update) -> set[Expert]:
    return {expert for expert in map(expert_of, update.delta) if expert is not None}


# What learns


@dataclass
class Steps:
    """What local training did, one entry per optimizer step."""

    allowed: list[set[str]] = field(default_factory=list)
    values: list[dict[str, torch.Tensor]] = field(default_factory=list)
    leaves: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)


@contextmanager
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """Record the names and values of every step, and the optimizer."""
    steps = Steps()
    hand = AdaptedModel.hand_gradients

    def spied(
        self: AdaptedModel, leaves: Mapping[str, nn.Parameter], names: Collection[str]
    ) -> None:
        steps.allowed.append(set(names))
        steps.values.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
        steps.leaves = dict(leaves)
        hand(self, leaves, names)

    class Spied(torch.optim.AdamW):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            steps.optimizers.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(AdaptedModel, "hand_gradients", spied)
        patch.setattr("torch.optim.AdamW", Spied)
        yield steps


@pytest.mark.parametrize("targets", [LORA, FULL], ids=["lora", "full"])
def test_an_expert_that_does_not_learn_stays_bit_for_bit_and_has_no_optimizer_state(
    targets: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick_recipe("hfedmoe", "client.weight_decay=0.1", *targets)
    strategy, clients, model, _ = build(recipe, tmp_path)
    state = start_server(strategy, model.fresh)
    client = clients[0]
    with spy(monkeypatch) as steps:
        train_client(strategy, client, Task(1, state.shared, LocalSettings(4, 0, 1e-2)))
    names = set(model.adapter_names)
    after = [*steps.values[1:], model.read(model.adapter_names)]
    still = 0
    for allowed, old, new in zip(steps.allowed, steps.values, after, strict=True):
        experts = {e for e in map(expert_of, allowed) if e is not None}
        assert client.budget_experts is not None
        assert NUM_LAYERS <= len(experts) <= client.budget_experts
        assert {name for name in names if expert_of(name) is None} <= allowed
        for name in names - allowed:
            assert torch.equal(old[name], new[name])
            still += 1
    assert still
    # Weight decay alone would move these; so would momentum what learned before.
    assert len({frozenset(allowed) for allowed in steps.allowed}) > 1
    ever = set().union(*steps.allowed)
    assert ever < names
    (optimizer,) = steps.optimizers
    assert {n for n, leaf in steps.leaves.items() if leaf in optimizer.state} == ever


def test_without_a_limit_nothing_is_masked(tmp_path: Path) -> None:
    plain = play(quick_recipe("fedavg", BUDGETS[0]), tmp_path / "plain")
    everything = "selection.threshold=0.0"
    for budget in ("", "100%", "16"):
        recipe = quick_recipe("hfedmoe", f"client.budget={budget}", everything)
        for own, other in zip(play(recipe, tmp_path / f"b{budget}"), plain, strict=True):
            assert equal(own.delta, other.delta)


CHOOSING = [rank for rank in RANKS if rank != "none"]


# Every cadence and every ranking once.
@pytest.mark.parametrize(
    ("rank_by", "cadence"),
    short_first(
        zip(CHOOSING, itertools.cycle(CADENCES)),
        itertools.product(CHOOSING, CADENCES),
    ),
)
def test_every_way_to_choose_keeps_the_budget(
    rank_by: str, cadence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick_recipe(
        "hfedmoe",
        f"selection.rank_by={rank_by}",
        f"selection.cadence={cadence}",
        "selection.threshold=0.0",
        *(["selection.every=2"] if cadence == "steps" else []),
    )
    strategy, clients, model, _ = build(recipe, tmp_path)
    state = start_server(strategy, model.fresh)
    choices = []
    choose = Session.choose

    def counted(self: Session, *args: Any) -> Any:
        choices.append(self.step)
        return choose(self, *args)

    monkeypatch.setattr(Session, "choose", counted)
    with spy(monkeypatch) as steps:
        update = train_client(
            strategy, clients[0], Task(1, state.shared, LocalSettings(4, 0, 1e-3))
        )
    assert choices == {"batch": [0, 1, 2, 3], "steps": [0, 2], "round": [0], "run": [0]}[cadence]
    for allowed in steps.allowed:
        assert len({e for e in map(expert_of, allowed) if e is not None}) <= QUARTER
    assert len(sent(update)) == ALL_EXPERTS
    assert update.metrics["client/active_experts"] <= QUARTER
    assert update.metrics["client/trained_experts"] == len(moved(update))
    kept = clients[0].store.load(before_round=2)
    assert (kept is not None) == (cadence == "run")


def test_without_a_ranking_all_experts_train_whatever_the_budget(tmp_path: Path) -> None:
    everything = ["selection.rank_by=none", "selection.threshold=0.0"]
    plain = play(quick_recipe("fedavg", BUDGETS[0]), tmp_path / "plain")
    without = play(quick_recipe("hfedmoe", *everything), tmp_path / "none")
    for own, other in zip(without, plain, strict=True):
        assert own.metrics["client/budget_experts"] == ALL_EXPERTS
        assert equal(own.delta, other.delta)


def test_trained_experts_are_those_that_a_token_of_a_step_chose(tmp_path: Path) -> None:
    """A choice on other batches may name experts that the round's own never use."""
    recipe = quick_recipe(
        "hfedmoe", "selection.cadence=round", "selection.rank_by=random", "client.batch_size=1"
    )
    strategy, clients, model, _ = build(recipe, tmp_path)
    state = start_server(strategy, model.fresh)
    seen: list[Trained] = []

    def weigh(client: Client, task: Task, trained: Trained) -> Any:
        seen.append(trained)
        return strategy.weigh(client, task, trained)

    noting = Strategy(strategy.prepare, strategy.objective, weigh)
    train_client(noting, clients[1], Task(1, state.shared, LocalSettings(1, 0, 1e-3)))
    (trained,) = seen
    experts = marked(layer_values(trained.observed, "trained"))
    names = {n for n, delta in trained.delta.items() if bool(delta.any())}
    # A token whose output no label depends on gives its experts no gradient.
    assert {e for e in map(expert_of, names) if e is not None} <= experts
    assert len(experts) < ALL_EXPERTS


# What is sent


def test_only_used_experts_are_sent_and_only_trained_ones_where_asked_for(tmp_path: Path) -> None:
    found = {}
    for required in ("false", "true"):
        override = f"selection.require_trained={required}"
        found[required] = play(tiny_recipe("hfedmoe", override), tmp_path / required)
    everything = play(tiny_recipe("hfedmoe", "selection.experts=all"), tmp_path / "all")
    for used, trained, whole in zip(found["false"], found["true"], everything, strict=True):
        assert 0 < len(sent(used)) < 32
        assert sent(used) & moved(whole) <= sent(trained) <= sent(used)
        assert len(sent(trained)) <= trained.metrics["client/trained_experts"]
        assert len(sent(whole)) == 32
        assert used.metrics["client/preference"] >= trained.metrics["client/preference"] > 0
    assert any(sent(a) < sent(b) for a, b in zip(found["true"], found["false"], strict=True))


def test_an_expert_that_nobody_sent_keeps_its_value_bit_for_bit(tmp_path: Path) -> None:
    strategy, clients, model, _ = build(quick_recipe("hfedmoe", *FULL), tmp_path)
    state = start_server(strategy, model.fresh)
    updates = [train_client(strategy, client, Task(1, state.shared, FIRST)) for client in clients]
    after = update_server(strategy, state, updates)
    anyone = set().union(*map(sent, updates))
    assert 0 < len(anyone) < ALL_EXPERTS
    for name, old in state.shared.items():
        if expert_of(name) is not None and expert_of(name) not in anyone:
            assert torch.equal(after.shared[name], old)
        else:
            assert not torch.equal(after.shared[name], old) or not any(
                update.delta[name].any() for update in updates if name in update.delta
            )


def test_joined_with_flex_it_sends_no_graft_and_keeps_the_budget(tmp_path: Path) -> None:
    recipe = quick_recipe("flex+hfedmoe", "selection.cadence=round", "selection.threshold=0.0")
    strategy, clients, model, _ = build(recipe, tmp_path)
    state = start_server(strategy, model.fresh)
    updates = [train_client(strategy, client, Task(1, state.shared, FIRST)) for client in clients]
    for client, update in zip(clients, updates, strict=True):
        assert client.budget_experts is not None
        assert NUM_LAYERS <= len(moved(update)) <= client.budget_experts
        assert update.delta.keys() == set(model.adapter_names)
        kept = client.store.load(before_round=2)
        assert kept is not None
        assert any(".graft." in name for name in kept.tensors)
    assert update_server(strategy, state, updates).round_number == 1
    assert digest(model.base_state) == model.base_digest


# How routers are averaged


def routers_after(
    kind: str, folder: Path, settings: LocalSettings = FIRST
) -> tuple[ServerState, ServerState, list[Update]]:
    strategy, clients, model, _ = build(
        quick_recipe("hfedmoe", f"selection.router={kind}", *FULL), folder
    )
    state = start_server(strategy, model.fresh)
    updates = [
        train_client(strategy, client, Task(1, state.shared, settings)) for client in clients
    ]
    return state, update_server(strategy, state, updates), updates


def alphas(updates: Sequence[Update]) -> list[float]:
    num_sent = len(set().union(*map(sent, updates)))
    return [update.metrics["client/preference"] / num_sent for update in updates]


@pytest.mark.parametrize("kind", ["preference", "literal", "damped", "examples"])
def test_routers_follow_their_formula(kind: str, tmp_path: Path) -> None:
    before, after, updates = routers_after(kind, tmp_path)
    alpha = alphas(updates)
    total = sum(alpha)
    rest = next(name for name in before.shared if expert_of(name) is None and not is_router(name))
    examples = [update.weight[rest] for update in updates]
    for name in filter(is_router, before.shared):
        old, deltas = before.shared[name], [update.delta[name] for update in updates]

        def weighted(weights: Sequence[float], terms: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.stack([w * t for w, t in zip(weights, terms, strict=True)]).sum(dim=0)

        expected = {
            "preference": old + weighted([a / total for a in alpha], deltas),
            "literal": weighted(alpha, [old + delta for delta in deltas]),
            "damped": old + weighted(alpha, deltas),
            "examples": old + weighted([n / sum(examples) for n in examples], deltas),
        }[kind]
        torch.testing.assert_close(after.shared[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["preference", "literal", "damped"])
def test_taken_as_printed_the_router_collapses(kind: str, tmp_path: Path) -> None:
    """At a vanishing learning rate: every client returns the router that it got."""
    before, after, updates = routers_after(kind, tmp_path, LocalSettings(2, 0, 1e-12))

    def norm(state: ServerState) -> float:
        rows = [tensor for name, tensor in state.shared.items() if is_router(name)]
        return float(torch.cat([row.flatten() for row in rows]).norm())

    total = sum(alphas(updates))
    assert total < 0.5
    factor = total if kind == "literal" else 1.0
    assert norm(after) / norm(before) == pytest.approx(factor, rel=1e-5)


# The worked numbers of the reconstruction: two layers, three experts, two clients

USAGE = [
    [[0.475, 0.35, 0.175], [0.225, 0.35, 0.425]],
    [[0.9, 0.06, 0.04], [0.02, 0.03, 0.95]],
]
IMPORTANCE = [[0.4975, 0.395, 0.1975], [0.2325, 0.375, 0.4425]]
NUM_EXAMPLES = (100, 300)
EXPERTS = [f"layers.{layer}.experts.{expert}.w" for layer in range(2) for expert in range(3)]
ROUTERS = [f"layers.{layer}.router.{expert}" for layer in range(2) for expert in range(3)]
OTHER = "layers.0.self_attn.q_proj.lora_A"


def worked(
    tau: float, *, start: float = 0.0, **settings: Any
) -> tuple[dict[str, float], list[Any]]:
    """Let both clients weigh updates of 1 and of 2 and the server take them."""
    strategy = hfedmoe(Strategy(), HfedmoeSettings(threshold=3 * tau, **settings))
    names = [*EXPERTS, *ROUTERS, OTHER]
    shared = {name: torch.full((2,), start) for name in names}
    updates, contributions = [], []
    for index, num_examples in enumerate(NUM_EXAMPLES):
        importance = IMPORTANCE if index == 0 else IMPORTANCE[::-1]
        observed = {}
        for layer in range(2):
            observed[f"usage.layers.{layer}"] = torch.tensor(USAGE[index][layer])
            observed[f"importance.layers.{layer}"] = torch.tensor(importance[layer])
            observed[f"trained.layers.{layer}"] = torch.tensor([True, True, False])
        delta = {name: torch.full((2,), index + 1.0) for name in names}
        trained = Trained(Plan(tuple(names)), delta, REPORT, observed)
        client: Any = SimpleNamespace(num_examples=num_examples)
        task = Task(1, shared, FIRST)
        contribution = strategy.weigh(client, task, trained)
        contributions.append(contribution)
        updates.append(Update(str(index), 1, contribution.delta, contribution.weight))
    state = update_server(strategy, ServerState(0, shared, {}), updates)
    assert all(bool((tensor == tensor[0]).all()) for tensor in state.shared.values())
    return {name: float(tensor[0]) for name, tensor in state.shared.items()}, contributions


REPORT = TrainingReport(
    loss=1.0,
    num_steps=1,
    num_tokens=1,
    num_examples=1,
    seconds=0.0,
    moved=frozenset(),
    mean_gradient=None,
)


def test_the_worked_numbers_come_out_of_client_and_server() -> None:
    values, contributions = worked(0.05)
    assert [values[name] for name in EXPERTS] == pytest.approx([1.75, 1.75, 1.0, 1.0, 1.0, 1.75])
    assert values[OTHER] == pytest.approx(1.75)
    preferences = [c.metrics["client/preference"] for c in contributions]
    # All six experts pass somewhere: alpha is the preference over 6.
    assert [p / 6 for p in preferences] == pytest.approx([0.130125, 0.069896], abs=1e-6)
    for name in ROUTERS:
        assert values[name] == pytest.approx(0.650557 * 1 + 0.349443 * 2, abs=1e-6)
    breadth = [sum(name in c.delta for name in EXPERTS) / 6 for c in contributions]
    assert breadth == [1.0, 0.5]


def test_a_higher_threshold_leaves_an_expert_as_it_was() -> None:
    values, contributions = worked(0.2, start=0.0)
    assert [values[name] for name in EXPERTS] == pytest.approx([1.75, 1.0, 0.0, 1.0, 1.0, 1.75])
    assert EXPERTS[2] not in contributions[0].delta.keys() | contributions[1].delta.keys()
    kept, _ = worked(0.2, start=0.3)
    assert kept[EXPERTS[2]] == float(torch.tensor(0.3))


def test_trained_experts_alone_pass_where_asked_for() -> None:
    _, contributions = worked(0.05, require_trained=True)
    for contribution in contributions:
        assert not any(name in contribution.delta for name in (EXPERTS[2], EXPERTS[5]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("literal", 0.130125 * (1 + 1) + 0.069896 * (1 + 2)),
        ("damped", 1 + 0.130125 * 1 + 0.069896 * 2),
        ("preference", 1 + 0.650557 * 1 + 0.349443 * 2),
        ("examples", 1 + 1.75),
    ],
)
def test_the_worked_router(kind: str, expected: float) -> None:
    values, _ = worked(0.05, start=1.0, router=kind)
    for name in ROUTERS:
        assert values[name] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("kind", ["preference", "literal", "damped"])
def test_where_nobody_prefers_anything_routers_count_by_examples(kind: str) -> None:
    values, contributions = worked(0.99, start=1.0, router=kind)
    assert all(c.metrics["client/preference"] == 0.0 for c in contributions)
    assert [values[name] for name in EXPERTS] == [1.0] * 6
    for name in (*ROUTERS, OTHER):
        assert values[name] == pytest.approx(1 + 1.75, rel=1e-6)


def test_who_prefers_nothing_has_no_say_beside_one_who_does() -> None:
    # From tau = 0.9 on only the second client has experts that pass.
    values, contributions = worked(0.9, start=1.0)
    assert [c.metrics["client/preference"] > 0 for c in contributions] == [False, True]
    for name in ROUTERS:
        assert values[name] == pytest.approx(1 + 2.0, rel=1e-6)


def test_names_of_routers_tell_rows_from_what_rows_share() -> None:
    assert router_row_of("layers.3.router.17") == ("layers.3", 17)
    assert router_row_of("layers.3.router_bias.17") == ("layers.3", 17)
    assert router_row_of("layers.3.router.17.lora_B") == ("layers.3", 17)
    assert router_row_of("layers.3.router.lora_A") is None
    assert router_row_of("layers.3.experts.17.down_proj.lora_B") is None
    assert is_router("layers.3.router.lora_A")
    assert expert_of("decoder.layers.3.experts.17.down_proj.lora_B") == ("decoder.layers.3", 17)
    assert expert_of("layers.3.self_attn.q_proj.lora_A") is None
