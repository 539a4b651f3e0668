"""Every method with protection runs, or is refused in a sentence that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from federations import has_budget, quick_recipe, run_quickly
from orchard.engine.simulator import sample_clients
from orchard.experiment.methods import METHODS, has_grafts
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.protecting import build_protection, example_privacy, private_rounds
from orchard.experiment.running import build_schedule
from orchard.recipe.options import Recipe
from orchard.seeding import Seeds
from orchard.server.accounting import spent

PRIVATE = (
    "server.weighting=uniform",
    "privacy.epsilon=8",
    "privacy.delta=1e-3",
    "privacy.random=seed",
)
SOUND = {
    "client": (
        *("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedprox", "flex"),
        *("ditto", "orchard"),
    ),
    "example": (
        *("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "flex", "local", "finetune"),
        "orchard",
    ),
}
JOINED = ("flex+fedadam", "flex+hfedmoe", "fedprox+scaffold", "flex+local")


def private(method: str, *overrides: str, unit: str = "client") -> Recipe:
    return quick_recipe(method, *PRIVATE, f"privacy.unit={unit}", *overrides)


def grafts_of(method: str) -> tuple[str, ...]:
    """Return what keeps a method's grafts from looking at examples."""
    chosen = ("strategy.graft_choice=random",) if has_grafts(method.split("+")) else ()
    return (*chosen, *(("strategy.judged_below=0",) if method == "orchard" else ()))


def sizes(number: int = 4) -> dict[str, int]:
    return {f"client-{index}": 40 for index in range(number)}


def epsilons(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["round/epsilon"] for line in lines if line["kind"] == "round"]


@pytest.mark.parametrize("unit", SOUND)
@pytest.mark.parametrize("method", [*METHODS, *JOINED])
def test_a_method_is_protected_or_refused_before_a_model_is_loaded(method: str, unit: str) -> None:
    needs = grafts_of(method) if unit == "example" else ()
    if {*method.split("+")} <= {*SOUND[unit]}:
        recipe = private(method, *needs, unit=unit)
        prepare_experiment(recipe)
        assert (build_protection(recipe, sizes()) is not None) == (unit == "client")
        assert bool(example_privacy(recipe, sizes())) == (unit == "example")
        return
    with pytest.raises(ValueError, match=r"^strategy.name must not hold .* with privacy.unit"):
        prepare_experiment(private(method, *needs, unit=unit))


def test_the_sound_and_the_refused_are_all_there_is() -> None:
    budgets = {*filter(has_budget, METHODS)}
    refused = {unit: {*METHODS} - {*sound} for unit, sound in SOUND.items()}
    assert refused == {
        "client": budgets | {"scaffold", "local", "finetune"},
        "example": budgets | {"scaffold", "fedprox", "ditto"},
    }


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("flex", "strategy.graft_choice=reconstruction", "strategy.graft_choice must be random"),
        ("orchard", "strategy.graft_choice=reconstruction", "strategy.graft_choice must be random"),
        ("orchard", "strategy.judged_below=8", "strategy.judged_below must be 0"),
    ],
)
def test_a_graft_that_looks_at_examples_is_refused_where_they_are_protected(
    method: str, override: str, words: str
) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        prepare_experiment(private(method, *grafts_of(method), override, unit="example"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("server.weighting=examples", "server.weighting must be uniform"),
        ("server.aggregation=median", "server.aggregation must be mean"),
        ("privacy.epsilon=0", "privacy.epsilon or privacy.noise must be given"),
        ("privacy.delta=0.25", "privacy.delta must be below 1 / 4"),
        ("privacy.clip_quantile=0.5", "privacy.clip_quantile must be 0 with 4 clients"),
        ("privacy.noise=0.05", "privacy.epsilon must pay for one round at least"),
    ],
)
def test_what_does_not_hold_is_refused(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        prepare_experiment(private("fedavg", override))


def test_each_round_says_what_it_cost_and_a_resumed_run_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = private("flex+fedadam", "server.rounds=3", "server.clients_per_round=2")
    whole = run_quickly(tmp_path / "whole", recipe)
    cost = epsilons(tmp_path / "whole")
    noise = whole["privacy"]["noise"]
    assert cost == [
        pytest.approx(spent(noise=noise, sampling_rate=0.5, rounds=n, delta=1e-3))
        for n in (1, 2, 3)
    ]
    assert 7.9 < cost[-1] <= 8.0
    assert whole["privacy"]["epsilon"] == cost[-1]
    assert _resumed(tmp_path / "cut", recipe, monkeypatch) == whole["shared_digest"]
    assert epsilons(tmp_path / "cut") == cost


def _resumed(folder: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Any:
    import orchard.engine.simulator as simulator

    save = simulator.save_checkpoint

    def once(*arguments: Any, **named: Any) -> Path:
        made = save(*arguments, **named)
        raise KeyboardInterrupt(made)

    monkeypatch.setattr(simulator, "save_checkpoint", once)
    with pytest.raises(KeyboardInterrupt):
        run_quickly(folder, recipe)
    monkeypatch.setattr(simulator, "save_checkpoint", save)
    return run_quickly(folder, recipe)["shared_digest"]


def test_a_run_ends_when_its_budget_is_spent(tmp_path: Path) -> None:
    recipe = private("fedavg", "privacy.noise=1.2", "privacy.epsilon=9", "server.rounds=50")
    number = private_rounds(recipe, sizes())
    assert 0 < number < 50
    result = run_quickly(tmp_path, recipe)
    assert result["num_rounds"] == number
    assert result["privacy"]["epsilon"] <= 9


def test_without_protection_nothing_is_said_of_it(tmp_path: Path) -> None:
    assert "privacy" not in run_quickly(tmp_path, quick_recipe("fedavg", "server.rounds=1"))


@pytest.mark.parametrize("random", ["seed", "system"])
def test_each_client_is_in_a_cohort_by_itself(random: str) -> None:
    recipe = private("fedavg", "server.clients_per_round=2", f"privacy.random={random}")
    schedule, clients = build_schedule(recipe), list(range(4))
    cohorts = [sample_clients(clients, schedule, Seeds(1), number) for number in range(400)]
    sizes = {len(cohort) for cohort in cohorts}
    assert sizes == {0, 1, 2, 3, 4}
    for client in clients:  # 200 are expected; 140 or 260 are 6 deviations off
        assert 140 < sum(client in cohort for cohort in cohorts) < 260
    again = [sample_clients(clients, schedule, Seeds(1), number) for number in range(400)]
    assert (cohorts == again) == (random == "seed")


def test_the_examples_of_every_client_keep_the_budget_and_a_run_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = private("flex", "strategy.graft_choice=random", "privacy.epsilon=3", unit="example")
    whole = run_quickly(tmp_path / "whole", recipe)["privacy"]
    assert whole["epsilon"] == max(whole["epsilon_per_client"].values()) <= 3.0
    assert epsilons(tmp_path / "whole")[-1] == whole["epsilon"]
    digest = json.loads((tmp_path / "whole" / "result.json").read_text())["shared_digest"]
    assert _resumed(tmp_path / "cut", recipe, monkeypatch) == digest


def test_a_spent_budget_stays_spent_when_a_run_that_was_cut_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds before the cut count: the run ends in the round in which it would have ended."""
    recipe = private("fedavg", "privacy.noise=2.2", "privacy.epsilon=3", "server.rounds=50")
    number = private_rounds(recipe, sizes())
    assert number == 3
    _resumed(tmp_path, recipe, monkeypatch)
    cost = epsilons(tmp_path)
    assert len(cost) == number
    noise, rate = 2.2, 1.0
    assert cost[-1] == pytest.approx(
        spent(noise=noise, sampling_rate=rate, rounds=number, delta=1e-3)
    )
    assert cost[-1] <= 3 < spent(noise=noise, sampling_rate=rate, rounds=number + 1, delta=1e-3)
    run_quickly(tmp_path, recipe)
    assert epsilons(tmp_path) == cost
