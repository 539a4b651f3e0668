"""Models of a run's folder, by name."""

from __future__ import annotations

import random
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchard.client.store import DamagedError
from orchard.communication.messages import Task
from orchard.models.stored.loading import load_base
from orchard.models.view.moe import MoEView
from orchard.personal.opening import open_model
from orchard.personal.state import read_state
from orchard.serving.engine import Engine, Row
from orchard.serving.registry import Registry, Source, find_sources
from orchard.serving.values import Factors, RowValues
from orchard.serving.worker import Job, Worker
from orchard.strategies.strategy import _place
from tests.federations import build, quick_recipe, run_quickly, short_model


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


@pytest.mark.long
def test_clients_that_carve_are_served_beside_others(tmp_path: Path) -> None:
    recipe = quick_recipe("flex+hfedmoe", "selection.mode=carve", "selection.cadence=round")
    run_quickly(tmp_path / "run", recipe)
    base = load_base(recipe.model.path, dtype=recipe.model.dtype)
    registry = Registry(base.view, base.digest, find_sources([tmp_path / "run"]))
    clients = [name for name in registry.sources if name not in ("base", "global")]
    assert clients
    engine = Engine(base.view, keeps_logits=True)
    rows = {name: Row(registry.values(name), [5, 6, 7, 8], 3) for name in (*clients, "global")}
    with engine.running():
        for row in rows.values():
            engine.submit(row)
        while not engine.is_idle:
            engine.step()
    for name, row in rows.items():
        state = read_state(tmp_path / "run", client=name if name in clients else None)
        read = torch.tensor([[*row.prompt, *row.tokens[:-1]]])
        with open_model(state) as opened, torch.inference_mode():
            expected = opened.model(input_ids=read).logits[0, -1]
        torch.testing.assert_close(row.logits_V, expected, atol=1e-4, rtol=0.0)
    # What a submodel has of the base is in memory once.
    opened = registry.values(clients[0]).opened
    assert opened is not None
    own: Any = opened.model
    whole: Any = base.view.model
    assert own.get_input_embeddings().weight.data_ptr() == (
        whole.get_input_embeddings().weight.data_ptr()
    )


def test_opening_many_models_keeps_few_in_memory(tmp_path: Path) -> None:
    recipe = quick_recipe("flex")
    run_quickly(tmp_path / "run", recipe)
    base = load_base(recipe.model.path, dtype=recipe.model.dtype)
    sources = find_sources([tmp_path / "run"])
    one = next(source for source in sources.values() if source.client)
    many = {f"client_{number}": one for number in range(100)}
    registry = Registry(base.view, base.digest, many, max_models=2)
    worker = Worker(Engine(base.view, max_rows=8), registry, max_queue=300)
    told: dict[int, str] = {}
    most = 0
    alive: weakref.WeakSet[RowValues] = weakref.WeakSet()

    def make(values: RowValues) -> Row:
        nonlocal most
        alive.add(values)
        most = max(most, len(alive))
        return Row(values, [5, 6], 2)

    def tell(number: int, what: Row | Exception) -> None:
        told[number] = what.finish if isinstance(what, Row) else str(what)

    names = [*many, *random.Random(0).choices(list(many), k=100)]
    assert worker.submit([Job(n, make, partial(tell, i)) for i, n in enumerate(names)])
    worker.start()
    worker.stop()
    assert set(told.values()) <= {"length", "stop"}
    assert len(told) == len(names)
    assert most == 2
    with pytest.raises(ValueError, match="max_models must be at least 1, got 0"):
        Registry(base.view, base.digest, many, max_models=0)


def test_the_model_that_was_used_longest_ago_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(short_model(), dtype="float32")
    sources = {name: Source(tmp_path, name) for name in "abcd"}
    monkeypatch.setattr(Registry, "_read", lambda self, folder, client, name: RowValues(body=name))
    registry = Registry(base.view, base.digest, sources, max_models=3)
    for name in "abcad":  # b was used before c, and a again after both
        assert registry.values(name).body == name
    assert list(registry.held) == ["c", "a", "d"]
    registry.values("b", keep=["c"])  # which is being read
    assert list(registry.held) == ["c", "d", "b"]


def test_no_two_models_have_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ["base", "global", "north"]
    monkeypatch.setattr("orchard.serving.registry.find_models", lambda folder: ids)
    assert list(find_sources([tmp_path / "run"])) == [
        "base",
        "run/global",
        "run/client/base",
        "run/client/global",
        "run/north",
    ]
    with pytest.raises(ValueError, match="RUN must be folders of different names"):
        find_sources([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    ids.append("client/global")
    with pytest.raises(ValueError, match="got run/client/global twice"):
        find_sources([tmp_path / "run"])


def test_a_model_of_no_numbers_harms_no_other() -> None:
    base = load_base(short_model(), dtype="float32")
    broken = RowValues(overrides={}, linear={_a_linear(base.view): _nan_factors(base.view)})
    rows = [Row(values, [5, 6, 7], 4) for values in (RowValues(), broken, RowValues())]
    engine = Engine(base.view)
    with engine.running():
        for row in rows:
            engine.submit(row)
        while not engine.is_idle:
            engine.step()
    assert [row.finish for row in rows] == ["length", "failed", "length"]
    assert "logits must be numbers" in str(rows[1].failure)


def _a_linear(view: MoEView) -> str:
    return next(path for path, _ in view.model.named_modules() if path.endswith("o_proj"))


def _nan_factors(view: MoEView) -> Factors:
    out, width = view.model.get_submodule(_a_linear(view)).get_parameter("weight").shape
    return Factors(torch.full((1, width), torch.nan), torch.ones(out, 1))
