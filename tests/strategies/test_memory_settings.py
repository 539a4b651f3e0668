"""What is chosen for speed or memory changes no result beyond rounding, under any method."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from federations import build, has_budget, quick_recipe
from orchard.communication.messages import LocalSettings, Task, Update
from orchard.experiment.methods import METHODS
from orchard.models.stored.loading import threads
from orchard.recipe.reading import known_options
from orchard.strategies.strategy import evaluate_client, start_server, train_client
from orchard.trees import Tree

# Each beside what it is compared with: 4 examples in one packed pass, on one thread.
SETTINGS = {
    "padded": ("client.packing=false",),
    "many passes": ("client.pass_tokens=1",),
    "one pass": ("client.pass_tokens=0",),
    "micro-batches": ("client.batch_size=1", "client.grad_accumulation=4"),
    "threads": ("model.num_threads=2",),
    "evaluation": ("evaluation.batch_size=1",),
    "mapped": ("model.placement=mapped",),
    "padded, in micro-batches": (
        *("client.packing=false", "client.batch_size=2", "client.grad_accumulation=2"),
        "evaluation.batch_size=3",
    ),
}
# One method for each way in which clients train; the others, pairs and single settings are long.
METHODS_SHORT = ("fedavg", "scaffold", "flex", "hfedmoe", "seermoe")
SHORT = ("many passes", "padded, in micro-batches")
PAIRS = ("flex+hfedmoe", "flex+scaffold", "flex+seermoe", "fedprox+scaffold+fedadam+flex")
CARVED = {"hfedmoe": ("selection.mode=carve", "selection.cadence=round")}
MEASURED = (
    "evaluation.models=local",
    "evaluation.metrics=loss,rouge_l,chrf",
    "evaluation.max_examples=3",
    "evaluation.max_new_tokens=3",
    "model.num_threads=1",
    "client.optimizer=sgd",  # AdamW makes whole steps of gradients that are rounding alone
)


def options_of(method: str, *overrides: str) -> tuple[str, ...]:
    # Adapters drop values wherever a method allows it: that must not depend on the reading either.
    dropout = () if has_budget(method) else ("model.lora_dropout=0.3",)
    graft = ("strategy.graft_dropout=0.3",) if "flex" in method else ()
    return (*MEASURED, *dropout, *graft, *overrides)


def play(method: str, folder: Path, *overrides: str) -> tuple[Update, Tree, dict[str, float]]:
    """Train one client for two steps; return what it sent, what it keeps and what is measured."""
    recipe = quick_recipe(method, *options_of(method, *overrides))
    strategy, clients, model, _ = build(recipe, folder)
    client = clients[0]
    task = Task(1, start_server(strategy, model.fresh).shared, LocalSettings(2, 0, 0.05), True)
    with threads(recipe.model.num_threads):
        update = train_client(strategy, client, task)
        later = dataclasses.replace(task, round_number=2)
        measured = evaluate_client(strategy, client, later, ("global", "personal"))
    kept = client.store.load(before_round=2)
    return update, kept.tensors if kept else {}, measured


@cache
def play_plainly(method: str, *own: str) -> tuple[Update, Tree, dict[str, float]]:
    with TemporaryDirectory() as folder:
        return play(method, Path(folder), *own)


def check_close(one: Tree, other: Tree) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def without_times(metrics: Any) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.endswith("_seconds")}


def check_setting(method: str, setting: tuple[str, ...], folder: Path, *own: str) -> None:
    expected, kept, measured = play_plainly(method, *own)
    if "model.placement=mapped" in setting:
        setting = (*setting, f"model.expert_cache={folder / 'experts'}")
    update, also_kept, also_measured = play(method, folder, *own, *setting)
    check_close(expected.delta, update.delta)
    check_close(kept, also_kept)
    assert update.weight == pytest.approx(expected.weight, rel=1e-4)
    assert without_times(update.metrics) == pytest.approx(
        without_times(expected.metrics), rel=1e-4, abs=1e-6
    )
    assert also_measured == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("method", METHODS_SHORT)
def test_settings_of_memory_change_no_method(method: str, name: str, tmp_path: Path) -> None:
    check_setting(method, SETTINGS[name], tmp_path)


# Every method is long with one setting, and every setting with two methods or three; all of their
# pairs are exhaustive.
ALL_PAIRS = [
    pytest.param(
        method, name, marks=pytest.mark.long if j == i % len(SETTINGS) else pytest.mark.exhaustive
    )
    for i, method in enumerate([*METHODS, *PAIRS])
    for j, name in enumerate(SETTINGS)
]


@pytest.mark.parametrize(("method", "name"), ALL_PAIRS)
def test_no_setting_of_speed_or_memory_changes_any_method(
    method: str, name: str, tmp_path: Path
) -> None:
    check_setting(method, SETTINGS[name], tmp_path)


@pytest.mark.parametrize("name", [pytest.param(SHORT[0], marks=pytest.mark.long), SHORT[1]])
def test_nor_one_of_clients_that_load_some_experts(name: str, tmp_path: Path) -> None:
    check_setting("hfedmoe", SETTINGS[name], tmp_path, *CARVED["hfedmoe"])


def test_every_option_of_speed_or_memory_is_among_them() -> None:
    tried = {option.partition("=")[0] for options in SETTINGS.values() for option in options}
    # Options whose meaning says that they are for memory, speed or threads alone.
    words = ("memory", "threads", "at a time", "behind each other", "micro-batch")
    about = {key: entry.metadata["about"] for key, (_, entry) in known_options().items()}
    found = {key for key, text in about.items() if any(word in text.lower() for word in words)}
    others = {
        "model.expert_cache",  # where mapped experts lie: what mapping changes is tried above
        "client.memory_bytes",  # what a client has: decides its budget of experts
        "client.router_aux_coefficient",
        "server.aggregation",
    }
    assert found - others == tried
