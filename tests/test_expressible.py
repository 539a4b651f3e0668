"""What the evidence needs is a recipe, or a few lines of one, and runs a round."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from federations import RECIPES, run_quickly, short_model
from orchard.recipe.reading import read_recipe

FEW = (
    *("client.steps=1", "client.batch_size=2", "server.rounds=1", "data.max_train=6"),
    *("evaluation.models=personal", "evaluation.metrics=loss", "evaluation.max_examples=2"),
    "evaluation.retention_path=",
)
ON_EXPERTS = "model.lora_targets=attention,experts"
BLOCKS = "strategy.calibration_blocks=2"

SENDS, KEEPS = False, True
# Its recipe, what it changes, and whether a client keeps parameters of its own.
CASES: dict[str, tuple[str, Sequence[str], bool]] = {
    "FedPer": ("fedavg", ["strategy.kept=layers.1.*"], KEEPS),
    "FedRep": (
        "fedavg",
        ["strategy.kept=layers.1.*", "strategy.kept_steps=1", "client.steps=2"],
        KEEPS,
    ),
    "FedSA-LoRA": ("fedavg", ["strategy.shared=*.lora_A", "strategy.kept=*.lora_B"], KEEPS),
    "dual LoRA": ("fedavg", [ON_EXPERTS, "strategy.kept=*.experts.*"], KEEPS),
    "private LoRA in place": (
        "fedavg",
        [
            ON_EXPERTS,
            "strategy.shared=layers.*.?_proj.lora_?",
            "strategy.kept=layers.0.experts.4.*, layers.1.experts.2.*",
        ],
        KEEPS,
    ),
    "frozen by pattern": ("fedavg", ["strategy.shared=*.q_proj.*"], SENDS),
    "fine-tuning at the end": (
        "finetune",
        ["server.rounds=2", "strategy.finetune_rounds=1"],
        KEEPS,
    ),
    "Ditto": ("ditto", [], KEEPS),
    "grafts of a rank and a number": (
        "flex",
        [BLOCKS, "strategy.graft_rank=4", "strategy.graft_experts=2"],
        KEEPS,
    ),
    "a random expert": ("flex", ["strategy.graft_choice=random"], KEEPS),
    "chosen on a corpus": ("flex", [BLOCKS, "strategy.calibration=corpus"], KEEPS),
    "chosen on the majority category": (
        "flex",
        [BLOCKS, "strategy.calibration=majority_category"],
        KEEPS,
    ),
    "no expert": (
        "flex",
        [
            "strategy.graft_choice=fresh",
            "strategy.graft_kind=dense",
            "strategy.graft_gate=closed",
        ],
        KEEPS,
    ),
    "Local with a graft": ("flex", [BLOCKS, "strategy.name=flex+local"], KEEPS),
    "exact LoRA aggregation": ("fedavg", ["server.lora_aggregation=product"], SENDS),
}
# What no other test runs.
SHORT = ("FedRep", "private LoRA in place", "chosen on a corpus")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in CASES]
)
def test_it_is_a_recipe_and_runs(name: str, tmp_path: Path) -> None:
    recipe, changes, keeps = CASES[name]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f"{json.dumps({'text': 'a word of news ' * 8})}\n" * 4))
    settings = [f"model.path={short_model()}", *FEW, *changes]
    if "strategy.calibration=corpus" in changes:
        settings.append(f"strategy.calibration_path={corpus}")
    read = read_recipe(RECIPES / "tiny" / f"{recipe}.toml", settings).recipe
    result = run_quickly(tmp_path / "run", read)
    assert 0 < result["summary"]["personal"]["loss"]["mean"] < 10
    private = result["parameters"]["private"].values()
    assert [number > 0 for number in private] == [keeps] * len(result["clients"])
    assert all(own["num_train"] == 6 for own in result["clients"].values())
