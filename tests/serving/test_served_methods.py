"""Models of every method are served as they are opened, rows of all of a run's in one batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from orchard.experiment.methods import METHODS
from orchard.models.stored.loading import load_base
from orchard.personal.opening import open_model
from orchard.personal.state import read_state
from orchard.serving.engine import Engine, Row
from orchard.serving.registry import Registry, find_sources
from tests.federations import quick_recipe, run_quickly

# Those whose clients keep what FLEx's do not; the others are sent as FedAvg's.
SHORT = {
    "orchard": ("orchard",),
    "kept": ("fedavg", "model.lora_targets=q_proj,router,experts", "strategy.kept=*.experts.*"),
}
LONG = {
    "ditto": ("ditto",),
    "finetune": ("finetune",),
    "difference": ("flex", "strategy.graft_mix=difference", "strategy.graft_experts=2"),
    "kept attention": ("fedavg", "strategy.kept=*.v_proj.*"),
    **{name: (name,) for name in ("fedavg", "local", "hfedmoe", "fedmoe")},
}
ALL = {name: (name,) for name in METHODS if name not in (*SHORT, *LONG, "flex")}


@pytest.mark.parametrize(
    "case",
    [
        *SHORT,
        *(pytest.param(name, marks=pytest.mark.long) for name in LONG),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ALL),
    ],
)
def test_rows_of_a_method_are_those_of_its_opened_models(case: str, tmp_path: Path) -> None:
    method, *options = {**SHORT, **LONG, **ALL}[case]
    recipe = quick_recipe(method, *options)
    run = tmp_path / "run"
    run_quickly(run, recipe)
    base = load_base(recipe.model.path, dtype="float32")
    registry = Registry(base.view, base.digest, find_sources([run]))
    draw = random.Random(case)
    names = [*registry.sources, *draw.choices(list(registry.sources), k=3)]
    rows = [
        (
            name,
            Row(
                registry.values(name),
                [draw.randrange(5, 300) for _ in range(draw.choice((1, 4, 30)))],
                draw.randrange(1, 6),
            ),
        )
        for name in names
    ]
    engine = Engine(base.view, max_rows=5, keeps_logits=True)
    with engine.running():
        for _, row in rows:
            engine.submit(row)
            engine.step()
        while not engine.is_idle:
            engine.step()
    plain: Any = load_base(recipe.model.path, dtype="float32").view.model
    changed = 0
    for name, row in rows:
        ids = torch.tensor([[*row.prompt, *row.tokens[:-1]]])
        with torch.inference_mode():
            of_base = plain(input_ids=ids).logits[0, -1]
            expected = of_base
            if name != "base":
                client = registry.sources[name].client
                with open_model(read_state(run, client=client)) as opened:
                    expected = opened.model(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(row.logits_V, expected, atol=1e-4, rtol=0.0)
        changed += not torch.equal(expected, of_base)
    assert changed, "nothing was trained"
