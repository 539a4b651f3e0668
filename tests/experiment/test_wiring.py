"""Encodings in whole runs: resumed, with partial participation, by method, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from federations import build, quick_recipe, run_quickly
from orchard.engine.progress import Silent
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import run_experiment
from orchard.experiment.wiring import build_channel
from orchard.recipe.options import Recipe
from orchard.recipe.run_options import CommunicationOptions
from orchard.results import MetricsLog
from orchard.server.checkpoint import load_checkpoint
from orchard.strategies.strategy import start_server, train_client
from orchard.trees import equal

INT8 = "communication.dtype=int8"
DIFFERENCES = "communication.downlink=differences"
ALL = (INT8, "communication.top_k=0.1", DIFFERENCES)


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the last checkpoint and of everything newest that clients keep."""
    newest = max((folder / "checkpoints").glob("round_*"))
    files = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    for own in {path.parent for path in (folder / "clients").rglob("round_*.safetensors")}:
        path = max(own.glob("round_*.safetensors"))
        files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def bytes_by_round(folder: Path) -> list[tuple[int, int]]:
    lines = [
        line for line in MetricsLog(folder / "metrics.jsonl").read() if line["kind"] == "round"
    ]
    return [(line["round/uplink_bytes"], line["round/downlink_bytes"]) for line in lines]


def run_for(folder: Path, recipe: Recipe, *, rounds: int) -> None:
    """Run a recipe until so many rounds are complete."""

    class Interrupted(Exception):
        pass

    class Stops(Silent):
        def completed(self, round_number: int, *, loss: float | None, uplink_bytes: int) -> None:
            if round_number == rounds:
                raise Interrupted

    with pytest.raises(Interrupted):
        run_experiment(prepare_experiment(recipe), folder=folder, reporter=Stops())


def test_bfloat16_is_the_default() -> None:
    assert CommunicationOptions().dtype == "bfloat16"


def test_a_resumed_run_repeats_residuals_and_copies_though_clients_lost_theirs(
    tmp_path: Path,
) -> None:
    recipe = quick_recipe("fedavg", *ALL, "server.rounds=4", "server.clients_per_round=3")
    run_quickly(tmp_path / "whole", recipe)
    run_for(tmp_path / "halves", recipe, rounds=2)
    for path in (tmp_path / "halves" / "clients").glob("*/held/*"):
        path.unlink()
    run_quickly(tmp_path / "halves", recipe)
    whole = tensors(tmp_path / "whole")
    assert whole == tensors(tmp_path / "halves")
    assert sum("residual" in name for name in whole) >= 3

    (up, down), (up_again, down_again) = (
        zip(*bytes_by_round(tmp_path / name), strict=True) for name in ("whole", "halves")
    )
    assert up == up_again
    assert [a == b for a, b in zip(down, down_again, strict=True)] == [True, True, False, True]
    assert down_again[2] > down[2]
    assert max(down[1:]) < down[0]

    state = load_checkpoint(tmp_path / "whole" / "checkpoints", about={})
    assert state is not None
    assert len(state.holders) == 3
    for client in state.holders:
        folder = tmp_path / "whole" / "clients" / client / "held"
        assert equal(load_file(folder / "round_000004.safetensors"), state.held)


def test_a_delta_is_taken_against_what_the_client_received(tmp_path: Path) -> None:
    recipe = quick_recipe("fedavg", "communication.dtype=bfloat16", "client.lr=1e-12")
    strategy, clients, model, _ = build(recipe, tmp_path)
    state, channel = start_server(strategy, model.fresh), build_channel(recipe)
    shared = {name: value + 1.0 / 3 for name, value in state.shared.items()}
    from orchard.communication.messages import LocalSettings, Task

    task = Task(1, shared, LocalSettings(1, 0, 1e-12))
    received = channel.unpack_task(channel.broadcast(task, {}).whole)
    update = train_client(strategy, clients[0], received)
    # At a vanishing learning rate a delta against the server's values would be bfloat16's error.
    assert max(float(delta.abs().max()) for delta in update.delta.values()) < 1e-6


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("hfedmoe", ALL),
        ("flex+fedadam", ALL),
        ("local", ALL),
    ],
)
def test_methods_run_with_all_encodings_and_keep_private_what_is(
    method: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    run_quickly(tmp_path, quick_recipe(method, *overrides))
    state = load_checkpoint(tmp_path / "checkpoints", about={})
    assert state is not None
    assert state.held.keys() == state.shared.keys()
    assert (method == "local") == (not state.shared)
    for path in (tmp_path / "clients").glob("*/*/round_*.safetensors"):
        assert load_file(path).keys() <= state.shared.keys()
    if "flex" in method:
        kept: Mapping[str, torch.Tensor] = load_file(
            tmp_path / "clients" / "hill" / "round_000002.safetensors"
        )
        assert any("graft" in name for name in kept)
        assert not any("graft" in name for name in state.held)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_control_variates_are_those_of_clients_but_for_their_residuals(
    dtype: str, tmp_path: Path
) -> None:
    recipe = quick_recipe("scaffold", f"communication.dtype={dtype}", "server.rounds=3")
    run_quickly(tmp_path, recipe)
    state = load_checkpoint(tmp_path / "checkpoints", about={})
    assert state is not None
    folders = [tmp_path / "clients" / name for name in ("harbor", "hill", "marsh", "forest")]
    own = [load_file(folder / "round_000003.safetensors") for folder in folders]
    lost = [load_file(folder / "residual" / "round_000003.safetensors") for folder in folders]
    for name, value in state.shared.items():
        if name.startswith("control."):
            mean = torch.stack([tree[name] for tree in own]).mean(0)
            residual = torch.stack([tree[name] for tree in lost]).mean(0)
            torch.testing.assert_close(value + residual, mean, rtol=1e-4, atol=1e-6)
            # Half a step of int8 is 0.004 of the largest value of a client's, not of the mean.
            largest = max(float(tree[name].abs().max()) for tree in own)
            assert float(residual.abs().max()) <= 0.01 * largest + 1e-6


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        (
            "fedavg",
            ("communication.top_k=1e-5",),
            r"communication\.top_k must be 0 or in 0\.0001\.\.1, got 1e-05; ",
        ),
        (
            "flex+scaffold",
            ("communication.top_k=0.1",),
            r"communication\.top_k must be 0 with scaffold, got 0\.1; ",
        ),
        (
            "scaffold",
            ("communication.dtype=bfloat16", "communication.feedback=false"),
            r"communication\.feedback must be true with scaffold and bfloat16, got false; ",
        ),
        (
            "scaffold",
            (INT8, "communication.feedback=false"),
            r"communication\.feedback must be true with scaffold and int8, got false; ",
        ),
    ],
)
def test_what_loses_too_much_is_refused_before_the_model_is_loaded(
    method: str, overrides: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("orchard.models.stored.loading.load_base")
    with pytest.raises(ValueError, match=f"^{message}"):
        prepare_experiment(quick_recipe(method, *overrides))


def test_feedback_without_anything_lost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^communication\.feedback must come with communication"):
        quick_recipe("fedavg", "communication.dtype=bfloat16", "communication.feedback=false")
    recipe = quick_recipe("fedavg", INT8, "communication.feedback=false")
    assert not build_channel(recipe).has_feedback
    assert build_channel(quick_recipe("fedavg", INT8)).has_feedback
    assert not build_channel(quick_recipe("fedavg")).has_feedback
