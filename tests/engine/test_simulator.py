from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from federations import (
    QUICK,
    RECIPES,
    build,
    final_tensors,
    prepared,
    quick_recipe,
    run_quickly,
)
from orchard.communication import messages
from orchard.communication.channel import Channel
from orchard.communication.messages import Task
from orchard.engine.progress import Silent
from orchard.engine.simulator import Schedule, sample_clients
from orchard.evaluation.loss import forward_losses
from orchard.experiment.data_record import data_digest
from orchard.experiment.holdings import build_federation, read_elsewhere
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.run_folder import recipe_digest
from orchard.experiment.running import build_schedule, run_experiment
from orchard.recipe.reading import read_recipe
from orchard.results import MetricsLog
from orchard.seeding import Seeds
from orchard.server.checkpoint import load_checkpoint
from orchard.trees import equal


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        *((name, ()) for name in ("scaffold", "flex+fedadam")),
        pytest.param("fedmoe", (), marks=pytest.mark.long),
        pytest.param("local", (), marks=pytest.mark.long),
        pytest.param("fedavg", (), marks=pytest.mark.long),
        pytest.param("flex", (), marks=pytest.mark.long),
        pytest.param("fedadam", (), marks=pytest.mark.long),
        pytest.param("flex+local", (), marks=pytest.mark.long),
        ("flex", ("strategy.graft_experts=3", "strategy.graft_budget=4")),
    ],
)
def test_two_rounds_resumed_to_four_equal_four_in_one_go(
    method: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = quick_recipe(method, "server.rounds=4", "client.steps=1", *overrides)
    run_quickly(tmp_path / "whole", recipe)

    class Interrupted(Exception):
        pass

    class StopsAfterTwo(Silent):
        def completed(self, round_number: int, *, loss: float, uplink_bytes: int) -> None:
            if round_number == 2:
                raise Interrupted

    with pytest.raises(Interrupted):
        run_experiment(
            prepare_experiment(recipe), folder=tmp_path / "halves", reporter=StopsAfterTwo()
        )
    run_quickly(tmp_path / "halves", recipe)
    assert final_tensors(tmp_path / "whole") == final_tensors(tmp_path / "halves")


def test_a_round_interrupted_between_clients_is_run_again_from_its_start(tmp_path: Path) -> None:
    recipe = quick_recipe("flex", "server.rounds=2")
    run_quickly(tmp_path / "whole", recipe)

    class Interrupted(Exception):
        pass

    class StopsInRoundTwo(Silent):
        calls = 0

        def working(self, what: str, *, share: float) -> None:
            self.calls += what.endswith("trains")
            if self.calls == 7:  # the third client of round 2, after two have saved their grafts
                raise Interrupted

    with pytest.raises(Interrupted):
        run_experiment(
            prepare_experiment(recipe), folder=tmp_path / "broken", reporter=StopsInRoundTwo()
        )
    run_quickly(tmp_path / "broken", recipe)
    assert final_tensors(tmp_path / "whole") == final_tensors(tmp_path / "broken")
    assert [line["round"] for line in rounds_of(tmp_path / "broken")] == [1, 2]
    # The two lines that the interrupted round had written are there once.
    lines = [line for line in MetricsLog(tmp_path / "broken" / "metrics.jsonl")]
    clients = [(line["round"], line["client"]) for line in lines if line["kind"] == "client"]
    assert len(clients) == len(set(clients)) == 8


def test_a_clients_line_is_in_the_log_when_the_next_one_trains(tmp_path: Path) -> None:
    seen = []

    class Looks(Silent):
        def working(self, what: str, *, share: float) -> None:
            if what.endswith("trains"):
                lines = MetricsLog(tmp_path / "metrics.jsonl")
                seen.append(sum(line["kind"] == "client" for line in lines))

    recipe = quick_recipe("fedavg")
    run_experiment(prepare_experiment(recipe), folder=tmp_path, reporter=Looks())
    assert seen == list(range(8))


def test_a_round_is_encoded_once_for_all_and_counted_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int] = []
    real = messages.encode_task

    def pack(task: Task, **options: Any) -> bytes:
        message = real(task, **options)
        packed.append(len(message))
        return message

    monkeypatch.setattr(messages, "encode_task", pack)
    run_quickly(tmp_path, quick_recipe("fedavg"))
    assert len(packed) == 2
    received = [line["round/downlink_bytes"] for line in rounds_of(tmp_path)]
    assert received == [4 * size for size in packed]


def test_what_a_client_does_to_its_task_stays_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick_recipe("fedavg")
    untouched = run_quickly(tmp_path / "untouched", recipe)["shared_digest"]
    real = Channel.unpack_task
    spoiled: list[Task] = []

    def unpack(channel: Channel, message: bytes, *rest: Any) -> Task:
        for task in spoiled:
            for tensor in task.shared.values():
                tensor.fill_(9.0)
        spoiled[:] = [real(channel, message, *rest)]
        return spoiled[0]

    monkeypatch.setattr(Channel, "unpack_task", unpack)
    assert run_quickly(tmp_path / "spoiled", recipe)["shared_digest"] == untouched


def rounds_of(folder: Path) -> list[dict[str, float]]:
    return [line for line in MetricsLog(folder / "metrics.jsonl").read() if line["kind"] == "round"]


@pytest.mark.long  # an exception in the place of the kill: the tests above
def test_a_run_killed_at_random_moments_ends_with_the_tensors_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    overrides = [
        *QUICK,
        "server.rounds=6",
        "evaluation.models=local,personal",
        "evaluation.metrics=loss",
    ]
    command = [
        sys.executable,
        "-c",
        "from orchard.cli import main; main()",
        "run",
        str(RECIPES / "tiny" / "flex.toml"),
        *overrides,
        "--resume",
        "--out",
    ]
    run_quickly(tmp_path / "whole", read_recipe(RECIPES / "tiny" / "flex.toml", overrides).recipe)
    killed = tmp_path / "killed"
    kills = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    generator = Seeds(7).generator("kills")
    while kills < 2:
        process = subprocess.Popen(
            [*command, str(killed)], env=environment, stdout=subprocess.DEVNULL
        )
        # From the first round on: what came before it has nothing to lose.
        before = len(list((killed / "checkpoints").glob("round_*/state.json")))
        deadline = time.monotonic() + 60
        while not _has_newer_checkpoint(killed, before) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(float(generator.uniform(0, 0.3)))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run([*command, str(killed)], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert kills == 2
    assert final_tensors(tmp_path / "whole") == final_tensors(killed)
    whole, resumed = (
        json.loads((f / "result.json").read_text()) for f in (tmp_path / "whole", killed)
    )
    assert whole["metrics"] == resumed["metrics"]
    assert whole["train_loss_per_round"] == resumed["train_loss_per_round"]
    # The headers hold seconds, whose digits differ.
    assert whole["uplink_bytes_per_round"] == pytest.approx(
        resumed["uplink_bytes_per_round"], rel=1e-3
    )


def _has_newer_checkpoint(folder: Path, before: int) -> bool:
    states = list((folder / "checkpoints").glob("round_*/state.json"))
    return bool(states) if before == 0 else any(p.stat().st_mtime > time.time() - 1 for p in states)


def test_the_record_of_a_run_is_complete(tmp_path: Path) -> None:
    recipe = quick_recipe(
        "flex", "evaluation.models=base,global,local,personal", "evaluation.metrics=loss"
    )
    result = run_quickly(tmp_path, recipe)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert read_recipe(tmp_path / "recipe.toml").recipe == recipe
    assert result["base_is_unchanged"]
    assert result["recipe_digest"] == recipe_digest(recipe)
    digests = data_digest(build_federation(recipe), retention=read_elsewhere(recipe).retention)
    assert result["data_digest"] == digests.overall
    assert {
        client: own["data_digest"] for client, own in result["clients"].items()
    } == digests.clients
    clients = ["harbor", "hill", "marsh", "forest"]
    for model in ("base", "global", "local", "personal"):
        assert list(result["metrics"][model]["loss"]) == clients
        summary = result["summary"][model]["loss"]
        assert summary["worst"] == max(result["metrics"][model]["loss"].values())
    assert len(result["uplink_bytes_per_round"]) == 2
    assert result["peak_memory_bytes"] > 10**8
    assert {"python", "torch", "transformers", "peft"} <= result["versions"].keys()
    seconds = result["seconds"]
    parts = seconds["training"] + seconds["overhead"]
    assert 0 < seconds["training"] < seconds["rounds"]
    assert parts <= seconds["rounds"] + 1e-6
    rounds = rounds_of(tmp_path)
    # Uplink as encoded: four clients' float32 adapters, plus headers.
    assert rounds[0]["round/uplink_bytes"] > 4 * 4 * sum(
        tensor.numel()
        for tensor in load_checkpoint(tmp_path / "checkpoints", about={}).shared.values()  # type: ignore[union-attr]
    )


def test_the_same_seed_gives_the_same_record_and_another_seed_another(tmp_path: Path) -> None:
    results = [
        run_quickly(tmp_path / str(number), quick_recipe("flex", f"seed={seed}"))
        for number, seed in enumerate((3, 3, 4))
    ]
    assert results[0]["shared_digest"] == results[1]["shared_digest"] != results[2]["shared_digest"]
    assert results[0]["train_loss_per_round"] == results[1]["train_loss_per_round"]


def test_a_folder_of_another_recipe_is_not_continued(tmp_path: Path) -> None:
    run_quickly(tmp_path, quick_recipe("fedavg"))
    with pytest.raises(ValueError, match=r"^client\.lr must be 0\.0065 to resume the run"):
        run_quickly(tmp_path, quick_recipe("fedavg", "client.lr=1e-5"))


def test_bfloat16_halves_the_bytes_on_the_wire(tmp_path: Path) -> None:
    full, half = (
        run_quickly(tmp_path / dtype, quick_recipe("fedavg", f"communication.dtype={dtype}"))
        for dtype in ("float32", "bfloat16")
    )
    ratio = half["uplink_bytes_per_round"][0] / full["uplink_bytes_per_round"][0]
    assert 0.45 < ratio < 0.6


def test_cohorts_are_drawn_anew_each_round_and_repeat_with_the_seed(tmp_path: Path) -> None:
    _, clients, _, _ = build(quick_recipe("fedavg"), tmp_path)
    schedule = build_schedule(quick_recipe("fedavg", "server.clients_per_round=2"))
    drawn = [
        [c.client_id for c in sample_clients(clients, schedule, Seeds(0), n)] for n in range(1, 30)
    ]
    assert all(len(set(cohort)) == 2 for cohort in drawn)
    assert len({tuple(cohort) for cohort in drawn}) > 3
    again = [c.client_id for c in sample_clients(clients, schedule, Seeds(0), 5)]
    assert again == drawn[4]


def test_partial_participation_runs_and_counts_only_the_cohort(tmp_path: Path) -> None:
    result = run_quickly(tmp_path, quick_recipe("flex", "server.clients_per_round=2"))
    assert [line["round/num_clients"] for line in rounds_of(tmp_path)] == [2, 2]
    assert result["num_rounds"] == 2


def test_the_learning_rate_follows_a_cosine_over_rounds() -> None:
    schedule = Schedule(100, 0, 5, 0, 4e-5, 1e-6, True, 0, ())
    assert schedule.local(1).learning_rate == 4e-5
    assert schedule.local(51).learning_rate == pytest.approx((4e-5 + 1e-6) / 2)
    assert schedule.local(100).learning_rate == pytest.approx(1e-6, rel=0.02)
    rates = [schedule.local(n).learning_rate for n in range(1, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failing_client_says_round_and_client(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates that are too high overflow where a machine's kernels let them: here the loss does."""
    recipe = quick_recipe("fedavg", "server.rounds=2", "client.steps=1")
    third = list(prepared(recipe).train)[2]
    calls = []

    def overflow(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        calls.append(args)
        losses_T, router_loss = forward_losses(*args, **options)
        # Four clients in a round, and one pass each: the third of the second round.
        return (losses_T * value if len(calls) == 7 else losses_T), router_loss

    monkeypatch.setattr("orchard.client.training.forward_losses", overflow)
    with pytest.raises(
        FloatingPointError, match=r"^loss must be finite, .* lower client\.lr"
    ) as caught:
        run_quickly(tmp_path, recipe)
    assert caught.value.__notes__ == [f"in round 2, client {third}, local training"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_overflow_in_the_last_step_are_no_update(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss comes after it, and what a machine makes of 1e30 in a forward pass is its own."""

    def overflow(optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][-1].flatten()[0] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    with pytest.raises(FloatingPointError, match=r"must be finite, .* lower client\.lr") as caught:
        run_quickly(tmp_path, quick_recipe("flex", "client.steps=1"))
    assert any("client" in note and "round" in note for note in caught.value.__notes__)
    assert not list((tmp_path / "clients").rglob("round_*"))


def test_checkpoint_holds_the_state_that_the_run_ended_with(tmp_path: Path) -> None:
    from orchard.trees import digest

    result = run_quickly(tmp_path, quick_recipe("fedadam"))
    state = load_checkpoint(tmp_path / "checkpoints", about={})
    assert state is not None
    assert digest(state.shared) == result["shared_digest"]
    assert state.slots.keys() == {"first_moment", "second_moment"}
    assert not equal(state.slots["first_moment"], state.slots["second_moment"])
