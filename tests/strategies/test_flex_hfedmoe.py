"""FLEx and HFedMoE joined: a personal expert on a client that cannot afford all shared ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from federations import (
    ALL_EXPERTS,
    NUM_LAYERS,
    QUARTER,
    build,
    quick_recipe,
    run_quickly,
    short_first,
)
from orchard.client.client import Client
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.engine.progress import Silent
from orchard.experiment.methods import build_strategy
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import run_experiment
from orchard.experts.selection import passing
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.view.moe import MoELayer
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from orchard.server.checkpoint import ServerState
from orchard.strategies.expert_names import Expert, expert_of
from orchard.strategies.strategy import (
    Contribution,
    Strategy,
    Trained,
    evaluate_client,
    start_server,
    train_client,
    update_server,
)
from orchard.strategies.subset import layer_values, marked
from orchard.trees import Tree, digest, equal

MODES = {
    "mask": ("selection.mode=mask",),
    "carve": ("selection.mode=carve", "selection.cadence=round"),
}
# A frozen base, or experts and routers that are trained themselves.
TRAINED = {
    "lora": (),
    "full": ("model.lora_targets=q_proj", "model.full_targets=experts,router"),
}
# In a short run each of both is met once.
BOTH = short_first([("mask", "full"), ("carve", "lora")], itertools.product(MODES, TRAINED))
BUDGET = "client.budget=25%"
NUM_CLIENTS = 2
LAYERS = [f"layers.{index}" for index in range(NUM_LAYERS)]


def recipe_of(mode: str, *overrides: str) -> Recipe:
    return quick_recipe("flex+hfedmoe", BUDGET, *MODES[mode], *overrides)


@dataclass
class Play:
    """A tiny federation, and what its clients trained and sent in the last round."""

    strategy: Strategy
    clients: list[Client]
    model: AdaptedModel
    state: ServerState
    trained: list[Trained] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)

    def round(self, *, steps: int = 2, lr: float = 1e-2) -> None:
        self.trained.clear()
        weigh = self.strategy.weigh

        def noting(client: Client, task: Task, trained: Trained) -> Contribution:
            self.trained.append(trained)
            return weigh(client, task, trained)

        strategy = Strategy(self.strategy.prepare, self.strategy.objective, noting)
        task = Task(self.state.round_number + 1, self.state.shared, LocalSettings(steps, 0, lr))
        self.updates = [train_client(strategy, client, task) for client in self.clients]
        self.state = update_server(self.strategy, self.state, self.updates)

    def kept(self, client: Client) -> Tree:
        """Return what a client keeps after the last round."""
        personal = client.store.load(before_round=self.state.round_number + 1)
        assert personal is not None
        return personal.tensors

    def choices(self) -> list[tuple[tuple[int, ...], ...]]:
        return [
            tuple(
                tuple(self.kept(client)[f"{layer}.graft.expert"].reshape(-1).tolist())
                for layer in LAYERS
            )
            for client in self.clients
        ]


def start(recipe: Recipe, folder: Path) -> Play:
    strategy, clients, model, _ = build(recipe, folder)
    return Play(strategy, clients[-NUM_CLIENTS:], model, start_server(strategy, model.fresh))


def experts(names: Tree | frozenset[str]) -> set[Expert]:
    return {expert for expert in map(expert_of, names) if expert is not None}


@pytest.mark.parametrize(("mode", "kind"), BOTH)
def test_grafts_and_gates_train_whatever_the_budget_and_are_never_sent(
    mode: str, kind: str, tmp_path: Path
) -> None:
    play = start(recipe_of(mode, *TRAINED[kind]), tmp_path)
    play.round()
    before = [play.kept(client) for client in play.clients]
    play.round()
    names = set(play.model.adapter_names)
    for client, trained, update, old in zip(
        play.clients, play.trained, play.updates, before, strict=True
    ):
        personal = set(trained.plan.personal)
        assert {name.split(".graft.")[0] for name in personal} == set(LAYERS)
        assert {f"{layer}.graft.gate.weight" for layer in LAYERS} <= personal
        # In every step, though an expert may be held still beside it.
        assert personal <= trained.report.moved
        assert len(experts(trained.report.moved)) < ALL_EXPERTS
        new = play.kept(client)
        for name in personal:
            assert not torch.equal(new[name], old[name]), name
        assert update.delta.keys() <= names
        assert not any("graft" in name for name in (*update.delta, *play.state.shared))
        assert update.metrics["client/active_experts"] <= QUARTER
    assert digest(play.model.base_state) == play.model.base_digest


@pytest.mark.parametrize("mode", MODES)
def test_an_expert_is_sent_for_its_use_alone(mode: str, tmp_path: Path) -> None:
    play = start(recipe_of(mode), tmp_path)
    play.round()
    for trained, update in zip(play.trained, play.updates, strict=True):
        usage = layer_values(trained.observed, "usage")
        passed = passing(list(usage.values()), 1.0, None)
        used = marked(dict(zip(usage, passed, strict=True)))
        assert 0 < len(used) < ALL_EXPERTS
        assert experts(update.delta) == used & experts(trained.delta)


@pytest.mark.parametrize(("mode", "kind"), BOTH)
def test_an_expert_that_does_not_learn_does_not_move(mode: str, kind: str, tmp_path: Path) -> None:
    decay = "client.weight_decay=0.1"
    play = start(recipe_of(mode, decay, "selection.experts=all", *TRAINED[kind]), tmp_path)
    for _ in range(2):
        play.round()
        for trained in play.trained:
            still = experts(trained.delta) - experts(trained.report.moved)
            assert len(still) >= (ALL_EXPERTS - 2 * QUARTER if mode == "mask" else 0)
            for name, delta in trained.delta.items():
                if expert_of(name) in still:
                    assert not delta.any(), name


def test_beside_a_graft_a_budget_for_everything_masks_nothing(tmp_path: Path) -> None:
    everything = ("client.budget=", "selection.threshold=0.0", "selection.router=examples")
    joined = start(quick_recipe("flex+hfedmoe", *everything), tmp_path / "joined")
    targets = "model.lora_targets=q_proj,v_proj,router,experts"
    flex = start(quick_recipe("flex", targets), tmp_path / "flex")
    for play in (joined, flex):
        play.round()
        play.round()
    assert equal(joined.state.shared, flex.state.shared)
    for own, other in zip(joined.clients, flex.clients, strict=True):
        assert equal(joined.kept(own), flex.kept(other))


# The choice, and what a graft starts as


@pytest.mark.parametrize(
    ("choice", "sizes"),
    [
        (("choice=random",), {1}),
        pytest.param(("choice=reconstruction",), {1}, marks=pytest.mark.long),
        pytest.param(("loss=fitted",), {1}, marks=pytest.mark.long),
        pytest.param(("experts=2",), {2}, marks=pytest.mark.long),
        pytest.param(("experts=2", "choice=random"), {2}, marks=pytest.mark.long),
        (("experts=3", "budget=4"), {1, 2, 3}),
        # Sets by search are compared with brute force in tests/experts/test_graft_search.py.
        pytest.param(
            ("experts=4", "max_sets=8"), {4}, marks=pytest.mark.long
        ),  # not all sets of four: greedily, then by swaps
    ],
)
def test_the_choice_is_that_of_flex_alone_in_both_modes_and_stays(
    choice: tuple[str, ...], sizes: set[int], tmp_path: Path
) -> None:
    options = [f"strategy.graft_{option}" for option in choice]
    alone = start(quick_recipe("flex", *options), tmp_path / "flex")
    alone.round(steps=1)
    for mode in MODES:
        play = start(recipe_of(mode, *options), tmp_path / mode)
        for _ in range(2):
            play.round(steps=1)
            assert play.choices() == alone.choices()
    if choice != ("choice=reconstruction",):  # one expert in each of two layers
        assert len(set(alone.choices())) > 1
    assert {len(experts) for choices in alone.choices() for experts in choices} <= sizes


def test_a_search_runs_no_expert_that_a_carved_client_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    play = start(recipe_of("carve", "strategy.graft_experts=2"), tmp_path)
    monkeypatch.delattr(MoELayer, "run_expert")
    play.round(steps=1)
    assert all(len(own) == 2 for choices in play.choices() for own in choices)
    for update in play.updates:
        for layer in LAYERS:
            share = update.metrics[f"client/graft_loss_{layer}"]
            assert 0 < share == update.metrics[f"client/graft_loss_bound_{layer}"]


# Every pair of options once.
@pytest.mark.parametrize(
    ("mode", "kind", "graft", "number"),
    short_first(
        [
            ("mask", "lora", "lora", 1),
            ("mask", "full", "dense", 2),
            ("mask", "full", "lora", 2),
            ("carve", "lora", "dense", 2),
            ("carve", "full", "lora", 1),
            ("carve", "lora", "dense", 1),
        ],
        itertools.product(MODES, TRAINED, ["lora", "dense"], [1, 2]),
    ),
)
def test_a_graft_starts_as_its_expert_in_the_base(
    mode: str, kind: str, graft: str, number: int, tmp_path: Path
) -> None:
    """Whoever trained that expert before, and whether the model holds it."""
    override = (f"strategy.graft_kind={graft}", f"strategy.graft_experts={number}")
    rows = "strategy.graft_gate=router_row"
    play = start(recipe_of(mode, *override, rows, *TRAINED[kind]), tmp_path)
    base = play.model.view
    pretrained = {name: base.read(name).clone() for name in base.names()}
    play.round()
    last = play.clients[-1]
    chosen = play.choices()[-1]
    # Nobody has set the model back: it has the values of the last client's training.
    for path in last.store.folder.iterdir():
        path.unlink()
    task = Task(2, play.state.shared, LocalSettings(2, 0, 1e-2))
    held = []
    with play.strategy.prepare(last, task) as plan:
        model = plan.model or play.model
        for layer, experts_of in zip(model.view.layers, chosen, strict=True):
            assert len(experts_of) == number
            parameters = dict(layer.block.get_submodule("graft").named_parameters())
            for position, expert in enumerate(experts_of):
                held.append(expert in layer.expert_ids)
                outer = f"{position}." if number > 1 else ""
                inner = "base_layer." if graft == "lora" else ""
                for local in ("gate_proj", "up_proj", "down_proj"):
                    own = parameters[f"{outer}{local}.{inner}weight"]
                    assert torch.equal(own, pretrained[f"{layer.name}.experts.{expert}.{local}"])
            rows_GD = torch.stack([pretrained[f"{layer.name}.router.{e}"] for e in experts_of])
            if number == 1:
                assert torch.equal(parameters["gate.weight"], rows_GD[0])
            else:
                assert torch.equal(parameters["router.weight"], rows_GD)
    if mode == "mask":
        assert all(held)


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2])
def test_a_graft_outlives_the_rounds_that_hold_its_expert(number: int, tmp_path: Path) -> None:
    recipe = recipe_of("carve", "selection.rank_by=random", f"strategy.graft_experts={number}")
    play = start(recipe, tmp_path)
    seen: set[bool] = set()
    for _ in range(3):
        play.round()
        for trained, choice in zip(play.trained, play.choices(), strict=True):
            held = experts(trained.delta)
            seen |= {
                (layer, expert) in held
                for layer, own in zip(LAYERS, choice, strict=True)
                for expert in own
            }
            assert len(held) <= QUARTER
    assert seen == {True, False}
    client = play.clients[0]
    task = Task(4, play.state.shared, LocalSettings(2, 0, 1e-2))
    values = evaluate_client(play.strategy, client, task, ["global", "personal"])
    assert values["global/exact_match"] >= 0
    assert values["personal/exact_match"] >= 0


# Runs


@pytest.mark.parametrize(
    ("mode", "kind", "number"),
    [
        pytest.param("mask", "lora", 1, marks=pytest.mark.long),
        ("mask", "full", 1),
        pytest.param("carve", "full", 1, marks=pytest.mark.long),
        pytest.param("carve", "lora", 2, marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    mode: str, kind: str, number: int, tmp_path: Path
) -> None:
    grafts = (
        f"strategy.graft_kind={'dense' if kind == 'full' else 'lora'}",
        f"strategy.graft_experts={number}",
    )
    recipe = recipe_of(mode, f"server.clients_per_round={NUM_CLIENTS}", *grafts, *TRAINED[kind])
    whole = run_quickly(tmp_path / "whole", recipe)

    class Interrupted(Exception):
        pass

    class StopsInRoundTwo(Silent):
        calls = 0

        def working(self, what: str, *, share: float) -> None:
            self.calls += what.endswith("trains")
            if self.calls == NUM_CLIENTS + 2:  # the first of round 2 has saved its graft
                raise Interrupted

    with pytest.raises(Interrupted):
        run_experiment(
            prepare_experiment(recipe), folder=tmp_path / "halves", reporter=StopsInRoundTwo()
        )
    resumed = run_quickly(tmp_path / "halves", recipe)
    assert whole["shared_digest"] == resumed["shared_digest"]
    assert whole["base_is_unchanged"]
    files = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name / "clients").rglob("*.safetensors")
        }
        for name in ("whole", "halves")
    ]
    assert len(files[0]) == 2 * NUM_CLIENTS
    assert files[0] == files[1]


def test_its_recipes_differ_from_those_of_hfedmoe_in_method_and_budget_alone() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    for name in ("tiny", "dolly"):
        joined, parent = (
            read_recipe(folder / name / f"{method}.toml", ["client.budget=50%"]).recipe
            for method in ("flex_hfedmoe", "hfedmoe")
        )
        assert build_strategy(joined, num_clients=4) != build_strategy(parent, num_clients=4)
        sections = ("model", "data", "client", "selection", "server", "evaluation", "seed")
        for section in sections:
            assert getattr(joined, section) == getattr(parent, section)
        flex = read_recipe(folder / name / "flex.toml").recipe
        for section in ("data", "server", "evaluation", "seed"):
            assert getattr(joined, section) == getattr(flex, section)
        assert (joined.client.steps, joined.client.lr) == (flex.client.steps, flex.client.lr)
        assert joined.strategy.graft_rank == flex.strategy.graft_rank
        assert joined.strategy.graft_gate == flex.strategy.graft_gate
