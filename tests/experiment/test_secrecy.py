"""Every method under secure aggregation runs to the plain result, or is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import orchard.engine.simulator as simulator
from federations import quick_recipe, run_quickly
from orchard.communication.messages import Update
from orchard.engine.secret_sum import SUM, SecretRound
from orchard.experiment.methods import METHODS
from orchard.experiment.preparation import prepare_experiment
from orchard.recipe.options import Recipe
from orchard.secure.collector import Collector
from orchard.secure.fixed_point import Vector
from orchard.secure.rules import Masked
from orchard.strategies.strategy import update_server

SECURE = ("privacy.secure_aggregation=true",)
BY_EXAMPLES = "selection.router=examples"
JOINED = ("flex+fedadam", "flex+hfedmoe", "fedprox+scaffold+fedyogi")
REFUSED = {"local": "nothing is sent"}
# Of those that run: one whose clients send nothing at times, and one for each way to aggregate.
PLAYED = ("fedavg", "flex+hfedmoe", "fedavg_dropout")


def secure(method: str, *overrides: str) -> Recipe:
    own = (BY_EXAMPLES,) if "hfedmoe" in method else ()
    return quick_recipe(method, *SECURE, *own, *overrides)


@pytest.mark.parametrize("method", [*METHODS, *JOINED])
def test_a_method_is_summed_in_secret_or_refused_before_a_model_is_loaded(method: str) -> None:
    if method not in REFUSED:
        prepare_experiment(secure(method))
        return
    with pytest.raises(ValueError, match=f"^strategy.name must not hold .*{REFUSED[method]}"):
        prepare_experiment(secure(method))


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("hfedmoe", "selection.router=preference", "selection.router must be examples"),
        ("fedavg", "server.aggregation=median", "server.aggregation must be mean"),
        ("fedavg", "communication.top_k=0.1", "communication.top_k must be 0"),
        ("fedavg", "communication.dtype=int8", "communication.dtype must be float32 or bfloat16"),
        ("fedavg", "privacy.secure_neighbors=3", "privacy.secure_neighbors must be 0 or an even"),
        ("fedavg", "privacy.secure_least=5", "server.clients_per_round must be at least"),
        ("fedavg", "server.clients_per_round=2", "server.clients_per_round must be at least"),
    ],
)
def test_what_would_show_an_update_is_refused(method: str, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        prepare_experiment(quick_recipe(method, *SECURE, override))


def test_a_server_that_clips_updates_would_have_to_see_them() -> None:
    recipe = secure(
        "fedavg",
        *("server.weighting=uniform", "privacy.unit=client"),
        *("privacy.epsilon=8", "privacy.delta=1e-3"),
    )
    with pytest.raises(ValueError, match=r"^privacy.unit must be empty or example"):
        prepare_experiment(recipe)


def shared_of(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("round_*"))
    return load_file(newest / "shared.safetensors")


@pytest.mark.parametrize("method", PLAYED)
def test_the_run_ends_where_the_plain_one_does_and_repeats_to_the_bit(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("communication.dtype=float32", "server.rounds=1")
    own = (BY_EXAMPLES,) if "hfedmoe" in method else ()
    run_quickly(tmp_path / "plain", quick_recipe(method, *options, *own))
    seen: list[str] = []

    def watched(strategy: Any, state: Any, updates: Iterable[Update]) -> Any:
        def see(update: Update) -> Update:
            seen.append(update.client_id)
            return update

        return update_server(strategy, state, map(see, updates))

    monkeypatch.setattr(simulator, "update_server", watched)
    digests = [
        run_quickly(tmp_path / name, secure(method, *options))["shared_digest"]
        for name in ("secret", "again")
    ]
    assert digests[0] == digests[1]
    assert seen == [SUM, SUM]
    plain, secret = shared_of(tmp_path / "plain"), shared_of(tmp_path / "secret")
    assert plain.keys() == secret.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(secret[name], tensor, rtol=1e-4, atol=2e-7)
    assert any((tensor != 0).any() for tensor in plain.values())


def test_the_server_gets_vectors_that_say_nothing_and_bytes_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[Vector] = []
    rounds: list[SecretRound] = []
    add, begin = Collector.add, SecretRound.__init__

    def kept(self: Collector, masked: Masked) -> None:
        got.append(masked.vector.copy())
        add(self, masked)

    def begun(self: SecretRound, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        rounds.append(self)

    monkeypatch.setattr(Collector, "add", kept)
    monkeypatch.setattr(SecretRound, "__init__", begun)
    result = run_quickly(tmp_path, secure("fedavg", "server.rounds=1"))
    assert len(got) == len(result["clients"])
    for vector in got:
        # Most values of an update are tiny: unmasked, most of their upper bytes would be 0 or 255.
        upper = (vector >> 24).astype(int)
        assert 0.4 < (upper < 128).mean() < 0.6
        assert ((upper == 0) | (upper == 255)).mean() < 0.05
    (one,) = rounds
    assert result["uplink_bytes_per_round"] == [one.uplink_bytes]
    assert one.uplink_bytes > sum(vector.nbytes for vector in got)
    assert result["secure_aggregation"] == {"least": 3, "bound": 16.0, "neighbors": 0}


def test_a_value_beyond_the_bound_names_its_client(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite and within 1e-09") as caught:
        run_quickly(tmp_path, secure("fedavg", "privacy.secure_bound=1e-9", "server.rounds=1"))
    assert any("client " in note for note in caught.value.__notes__)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert not [line for line in lines if json.loads(line)["kind"] == "round"]
