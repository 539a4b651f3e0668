"""Both sides of the training step compute the same, and the figures are of what was run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchard.measurements import run_bench, step
from orchard.measurements.step import bench_answers, bench_random, bench_step
from orchard.measurements.step_memory import train_alone
from orchard.measurements.step_sides import StepCase, read_examples
from orchard.models.stored.loading import load_tokenizer
from orchard.models.stored.random_checkpoint import Shape
from orchard.results import environment

CASE = StepCase("orchard:tiny", steps=3, batch_size=4, max_tokens=160, num_threads=1)


def test_both_sides_have_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"peak_bytes": 8.0, "training_bytes": 2.0}
    monkeypatch.setattr(
        step,
        "measure_alone",
        lambda case, side: alone if side == "eager" else {k: v / 2 for k, v in alone.items()},
    )
    found = bench_step(CASE, repeats=1, experts=("eager",))
    assert found["same_losses"]
    assert found["largest_loss_difference"] < 1e-4
    examples = read_examples(CASE, load_tokenizer(CASE.path))
    assert found["num_tokens"] == sum(len(example.input_ids) for example in examples)
    speeds = found["tokens_per_second"]
    assert speeds.keys() == {"ours", "ours_padded", "peer_eager"}
    assert found["speedup"] == pytest.approx(speeds["ours"] / speeds["peer_eager"])
    assert found["speedup_padded"] == pytest.approx(speeds["ours_padded"] / speeds["peer_eager"])
    assert found["peak_bytes_ratio"] == found["training_bytes_ratio"] == 0.5
    assert 0 < found["share_of_matmul_limit"] < 1


def test_other_losses_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"peak_bytes": 1.0, "training_bytes": 1.0}
    monkeypatch.setattr(step, "measure_alone", lambda case, side: alone)
    train = step.OurSide.train

    def other(self: step.OurSide, *args: object, **options: object) -> object:
        losses, took = train(self, *args, **options)  # type: ignore[arg-type]
        return [loss + 0.01 for loss in losses], took

    monkeypatch.setattr(step.OurSide, "train", other)
    found = bench_step(CASE, repeats=1)
    assert not found["same_losses"]
    assert found["largest_loss_difference"] == pytest.approx(0.01, rel=0.1)


def test_a_side_alone_reports_its_memory() -> None:
    found = train_alone(replace(CASE, steps=1), "ours")
    assert 0 < found["training_bytes"] < found["peak_bytes"]
    assert found["loaded_bytes"] <= found["peak_bytes"]


def test_answers_are_those_of_the_peer() -> None:
    found = bench_answers(CASE, num_prompts=5, batch_size=3, max_new_tokens=6, repeats=1)
    assert found["num_prompts"] == 5
    assert found["same_share"] == 1
    assert found["speedup"] > 0


def test_without_a_model_a_random_one_is_written_and_both_sides_agree_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = []

    def alone(case: StepCase, side: str) -> dict[str, float]:
        paths.append(case.path)
        return {"peak_bytes": 1.0, "training_bytes": 1.0}

    monkeypatch.setattr(step, "measure_alone", alone)
    shape = Shape(
        layers=2,
        width=32,
        heads=2,
        experts=4,
        top_k=2,
        expert_width=16,
        shared_width=16,
        vocabulary=64,
    )
    case = StepCase("", "random", max_tokens=24, steps=2, num_threads=1)
    found = bench_random(repeats=1, shape=shape, case=case, num_prompts=3)
    assert found["shape"]["experts"] == 4
    assert found["middle"]["same_losses"]
    assert found["evaluation"]["same_share"] == 1
    assert found["evaluation"]["num_answer_tokens"] > 0
    assert paths
    assert not any(Path(path).exists() for path in paths)


def test_the_default_measures_a_random_model_and_a_given_one_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(step, "bench_random", lambda **kw: asked.append("random") or {})
    monkeypatch.setattr(
        step, "bench_steps", lambda **kw: asked.append((kw["model"], kw["data"])) or {}
    )
    for given in ({}, {"model": "m"}, {"model": "m", "data": "d"}, {"data": "d"}):
        run_bench("step", as_json=True, repeats=1, **given)
    assert asked == ["random", ("m", ""), ("m", "d"), ("orchard:tiny", "d")]


@pytest.mark.parametrize("as_json", [True, False])
def test_what_a_measurement_ran_on_stands_before_its_figures(
    as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "bench_random", lambda **kw: {"speedup": 2.0})
    shown = run_bench("step", as_json=as_json, repeats=1)
    if as_json:
        assert json.loads(shown) == {**environment(), "speedup": 2.0}
    else:
        assert f"hardware.cpu: {environment()['hardware']['cpu']}" in shown.splitlines()
        assert shown.splitlines()[-1] == "speedup: 2"


def test_a_model_is_for_the_measurements_that_take_one() -> None:
    with pytest.raises(
        ValueError, match=r"^NAME must be of step, serve with --model or --data, got g"
    ):
        run_bench("graft", as_json=True, repeats=1, model="somewhere")
