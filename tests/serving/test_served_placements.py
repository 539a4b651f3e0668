"""A base is served as its runs have it: mapped from disk, read where it lies, in few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from orchard.models.view.held import HeldExperts
from orchard.personal.opening import base_of, open_model
from orchard.personal.state import find_models, read_state
from orchard.serving.engine import Engine, Row
from orchard.serving.registry import Registry, find_sources
from orchard.serving.rows import Rows
from orchard.serving.running import make_server
from tests.federations import quick_recipe, run_quickly
from tests.served_runs import serving

PLACES = {
    "mapped": ("model.placement=mapped", "model.expert_cache=CACHE"),
    "lying": ("model.placement=mapped", "model.expert_cache=none"),
    "int8": ("model.frozen_precision=int8",),
    "nf4, mapped": (
        *("model.placement=mapped", "model.expert_cache=CACHE"),
        "model.frozen_precision=nf4",
    ),
}
SHORT = ("int8",)


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=() if p in SHORT else pytest.mark.long) for p in PLACES]
)
def test_rows_on_a_base_that_memory_does_not_hold_are_those_of_the_opened_models(
    place: str, tmp_path: Path
) -> None:
    options = [own.replace("CACHE", str(tmp_path / "cache")) for own in PLACES[place]]
    recipe = quick_recipe("flex", "server.rounds=1", *options)
    run = tmp_path / "run"
    run_quickly(run, recipe)
    base = base_of(recipe)
    assert isinstance(base.view.layers[0].storage, HeldExperts) == (place != "mapped")
    registry = Registry(base.view, base.digest, find_sources([run]))
    engine = Engine(base.view, keeps_logits=True)
    rows = {name: Row(registry.values(name), [5, 6, 7, 8], 3) for name in registry.sources}
    with engine.running():
        for row in rows.values():
            engine.submit(row)
        while not engine.is_idle:
            engine.step()
    found = []
    for name in ("global", *find_models(run)):
        state = read_state(run, client=None if name == "global" else name)
        read = torch.tensor([[*rows[name].prompt, *rows[name].tokens[:-1]]])
        with open_model(state) as opened, torch.inference_mode():
            expected = opened.model(input_ids=read).logits[0, -1]
        torch.testing.assert_close(rows[name].logits_V, expected, atol=1e-4, rtol=0.0)
        found.append(expected)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_experts_that_are_read_where_they_lie_are_not_read_before_they_are_used() -> None:
    options = ("model.placement=mapped", "model.expert_cache=none")
    view = base_of(quick_recipe("flex", *options)).view
    read: list[int] = []
    storage: Any = view.layers[0].storage
    tensors = storage.tensors
    storage.tensors = lambda expert: (read.append(expert), tensors(expert))[1]
    rows = Rows(view)
    assert read == []
    experts = rows._experts[0]
    assert experts[3] is experts[3]
    assert read == [3]
    assert len(experts) == view.layers[0].num_experts


def test_the_server_opens_the_base_as_its_run_has_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_quickly(run, quick_recipe("flex", "server.rounds=1", "model.frozen_precision=int8"))
    client = find_models(run)[0]
    with serving([run]) as url:
        body = {"model": client, "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
    # In full it is another base, and a run on that is another server's.
    other = tmp_path / "other"
    run_quickly(other, quick_recipe("flex", "server.rounds=1"))
    with pytest.raises(ValueError, match=r"RUN must be runs on one base, got .*other, which was"):
        make_server(
            [run, other],
            host="127.0.0.1",
            port=1,
            key_file=None,
            max_models=1,
            is_insecure=False,
        )


def test_runs_that_differ_in_their_place_alone_share_a_base_in_memory(tmp_path: Path) -> None:
    from orchard.serving.running import _open

    recipes = {
        "memory": quick_recipe("flex", "server.rounds=1"),
        "lying": quick_recipe("flex", "server.rounds=1", *PLACES["lying"]),
    }
    for name, recipe in recipes.items():
        run_quickly(tmp_path / name, recipe)
    lying, memory = tmp_path / "lying", tmp_path / "memory"
    for folders, is_held in (([lying], True), ([lying, memory], False), ([memory], False)):
        _, base = _open(folders)
        assert isinstance(base.view.layers[0].storage, HeldExperts) == is_held
