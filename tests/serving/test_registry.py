"""Models of a run's folder, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchard.client.store import DamagedError
from orchard.communication.messages import Task
from orchard.models.stored.loading import load_base
from orchard.personal.state import read_state
from orchard.serving.engine import Engine, Row
from orchard.serving.registry import Registry, find_sources
from orchard.strategies.strategy import _place
from tests.federations import build, quick_recipe, run_quickly


def test_models_of_a_run_answer_as_its_evaluation_measures_them(tmp_path: Path) -> None:
    recipe = quick_recipe("flex")
    run_quickly(tmp_path / "run", recipe)
    base = load_base(recipe.model.path, dtype=recipe.model.dtype)
    registry = Registry(base.view, base.digest, find_sources([tmp_path / "run"]), max_models=2)
    names = [name for name in registry.sources if name not in ("base", "global")]
    prompt = [5, 6, 7, 8]
    engine = Engine(base.view, keeps_logits=True)
    rows = {name: Row(registry.values(name), prompt, 1) for name in (*names, "base", "global")}
    assert len(registry.held) == 2
    with engine.running():
        for row in rows.values():
            engine.submit(row)
        while not engine.is_idle:
            engine.step()
    strategy, clients, model, _ = build(recipe, tmp_path / "run" / "clients")
    shared = read_state(tmp_path / "run").shared
    for client in clients:
        task = Task(recipe.server.rounds + 1, shared=shared, settings=None)  # type: ignore[arg-type]
        with strategy.prepare(client, task) as plan, torch.inference_mode():
            _place(client, task, plan)
            expected = model.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        found = rows[client.client_id].logits_V
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0.0)
    own = tmp_path / "run" / "clients" / names[0]
    stored = max(own.glob("round_*.safetensors"))
    registry.held.clear()
    stored.write_bytes(stored.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DamagedError, match="another checksum"):
        registry.values(names[0])
    registry.values(names[1])
    with pytest.raises(ValueError, match="did you mean"):
        read_state(tmp_path / "run", client="nobody")


def test_clients_that_carve_are_not_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_quickly(
        tmp_path / "run", quick_recipe("hfedmoe", "selection.mode=carve", "selection.cadence=round")
    )
    assert set(find_sources([tmp_path / "run"])) == {"base", "global"}
    assert "only its global model is served" in caplog.text
