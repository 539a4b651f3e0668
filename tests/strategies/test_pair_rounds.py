"""HFedMoE on an encoder-decoder: masked, carved, and exported as the family's own checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from family_rounds import moved_by, play
from federations import quick_recipe
from orchard.cli import app
from orchard.engine.progress import Silent
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import run_experiment
from orchard.models.stored.loading import load_base
from orchard.models.trainable.adapters import AdaptedModel
from orchard.models.trainable.targets import LoraSettings
from orchard.results import MetricsLog
from orchard.strategies.hfedmoe import HfedmoeSettings, hfedmoe
from orchard.strategies.session import SubsetSettings
from orchard.strategies.strategy import Strategy
from tiny_adapted import NumberTokenizer
from tiny_pairs import EXPERTS, tiny_switch, write_switch

LORA = LoraSettings(2, 4.0, 0.0, ("attention", "router", "experts"))


def test_a_client_that_affords_all_learns_the_same_masked_and_carved(tmp_path: Path) -> None:
    tiny_switch(size=64, capacity=2).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), dtype="float32")
    model = AdaptedModel(base.view, LORA, tokenizer=NumberTokenizer(), base_digest="", seed=0)
    for budget in (2 * EXPERTS, EXPERTS):
        updates = []
        for mode in ("mask", "carve"):
            subset = SubsetSettings(mode=mode, cadence="round", scoring_batches=1)
            strategy = hfedmoe(Strategy(), HfedmoeSettings(subset, threshold=0.0))
            folder = tmp_path / f"{mode}{budget}"
            _, update, _ = play(strategy, model, LORA, folder, budget=budget)
            updates.append(update)
        masked, carved = updates
        assert 0 < len(moved_by(masked)) <= budget
        assert 0 < len(moved_by(carved)) <= budget
        if budget == 2 * EXPERTS:
            assert masked.delta.keys() == carved.delta.keys()
            for name, delta in masked.delta.items():
                torch.testing.assert_close(carved.delta[name], delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", [pytest.param("mask", marks=pytest.mark.long), "carve"])
def test_a_recipe_is_run_measured_asked_and_exported(mode: str, tmp_path: Path) -> None:
    path = write_switch(tmp_path / "switch", capacity=8)
    recipe = quick_recipe(
        "hfedmoe",
        f"model.path={path}",
        f"selection.mode={mode}",
        "selection.cadence=round",
        "model.lora_targets=attention,router,experts",
        "server.rounds=1",
        "evaluation.models=global",
        "evaluation.metrics=loss,rouge_l",
        "evaluation.max_new_tokens=3",
    )
    run = tmp_path / "run"
    run_experiment(prepare_experiment(recipe), folder=run, reporter=Silent())
    lines = MetricsLog(run / "metrics.jsonl").read()
    (trained,) = [line["round/train_loss"] for line in lines if "round/train_loss" in line]
    assert 0 < trained < 10
    invoke = CliRunner().invoke
    asked = invoke(app, ["generate", str(run), "a", "--global", "--max-new-tokens", "4"])
    assert asked.exit_code == 0, asked.output
    out = tmp_path / "out"
    written = invoke(app, ["export", str(run), "--global", "--out", str(out)])
    assert written.exit_code == 0, written.output
    assert "AutoModelForSeq2SeqLM" in written.output
    before, after = load_file(Path(path) / "model.safetensors"), {}
    for file in out.glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert any(".expert_" in name for name in moved)
    assert all(name.split(".")[-2] in ("q", "k", "v", "wi", "wo", "classifier") for name in moved)
    AutoModelForSeq2SeqLM.from_pretrained(out)
    refused = invoke(app, ["export", str(run), "--global", "--adapter", "--out", str(out) + "2"])
    assert "--adapter must be asked of a model of which attention and routers" in refused.output
    served = invoke(app, ["serve", str(run)])
    assert "model.path must lead to a model that continues a text with orchard serve" in (
        " ".join(served.output.split())
    )
