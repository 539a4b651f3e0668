"""Rows of every family get the logits of their own model, whatever else is in the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from orchard.experiment.settings import graft_settings, lora_settings
from orchard.models.kernels.row_cache import why_not_in_rows
from orchard.models.stored.loading import load_base
from orchard.personal.opening import open_model
from orchard.serving.engine import Engine, Row
from orchard.serving.values import RowValues, read_values
from tests.tiny_exports import FAMILIES, checkpoint, recipe_on, state_of

# What differs most from what other tests serve: latent keys and values. A window of tokens is long.
SHORT = ("deepseek_v3",)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in FAMILIES],
)
def test_logits_of_rows_are_those_of_the_opened_model(family: str, tmp_path: Path) -> None:
    path = checkpoint(family, tmp_path)
    states = {
        "grafted": state_of(recipe_on(path, family, "flex"), grafts=(1,)),
        "two grafts": state_of(recipe_on(path, family, "flex"), grafts=(3, 0)),
        "global": state_of(recipe_on(path, family, "fedavg")),
    }
    base = load_base(path, dtype="float32")
    assert why_not_in_rows(base.view.model) == ""
    models = {"base": RowValues()} | {
        name: read_values(
            base.view,
            {**state.shared, **state.own},
            lora=lora_settings(state.recipe),
            graft=graft_settings(state.recipe),
            graft_experts=state.graft_experts,
            body=name,
        )
        for name, state in states.items()
    }
    draw = random.Random(family)
    vocabulary = base.view.model.config.get_text_config().vocab_size  # type: ignore[union-attr]
    # Prompts and answers are longer than the window of those that have one.
    rows = [
        (
            name,
            Row(
                models[name],
                [draw.randrange(3, vocabulary) for _ in range(draw.choice((1, 4, 15, 40)))],
                draw.randrange(1, 14),
            ),
        )
        for name in draw.choices(list(models), k=6) + list(models)
    ]
    engine = Engine(base.view, max_rows=6, prefill_tokens=32, keeps_logits=True)
    with engine.running():
        for _, row in rows:
            engine.submit(row)
            engine.step()
        while not engine.is_idle:
            engine.step()
    plain = load_base(path, dtype="float32").view.model
    for name, row in rows:
        ids = torch.tensor([[*row.prompt, *row.tokens[:-1]]])
        assert len(row.tokens) == row.max_tokens
        with torch.inference_mode():
            if name == "base":
                expected = plain(input_ids=ids).logits[0, -1]
            else:
                with open_model(states[name]) as opened:
                    expected = opened.model(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(row.logits_V, expected, atol=1e-4, rtol=0.0)
