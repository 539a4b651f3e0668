"""A run whose base is mapped, or in few bits, is exported as the model that it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from federations import quick_recipe, run_quickly, short_model
from orchard.cli import app
from orchard.experiment.starting import Start, record_start
from orchard.export.folder import export_model
from orchard.export.importing import make_run
from orchard.export.parts import export_adapter, export_graft
from orchard.personal.opening import open_model
from orchard.personal.state import find_models, read_state
from orchard.recipe.reading import parse_recipe
from tiny_exports import logits_of

PLACES = {
    "int8": ("model.frozen_precision=int8",),
    "nf4": ("model.frozen_precision=nf4",),
    "lying": ("model.placement=mapped", "model.expert_cache=none"),
}


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=() if p == "int8" else pytest.mark.long) for p in PLACES]
)
def test_what_loads_is_what_the_run_measured_on_its_base(place: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_quickly(run, quick_recipe("flex", "server.rounds=1", *PLACES[place]))
    client = find_models(run)[0]
    for name, own in (("global", None), ("personal", client)):
        state = read_state(run, client=own)
        done = export_model(state, tmp_path / name)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32, trust_remote_code=not done.is_stock
        ).eval()
        with open_model(state) as opened:
            expected = logits_of(opened.model)
        largest = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(logits_of(loaded), expected, atol=1e-5 * largest, rtol=0)
        base: Any = transformers.AutoModelForCausalLM.from_pretrained(short_model())
        values, before = loaded.state_dict(), base.state_dict()
        experts = next(n for n in before if n.endswith("experts.down_proj"))
        assert torch.equal(values[experts], before[experts]) == (place == "lying")


def test_parts_of_a_run_in_few_bits_go_back_on_its_base(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_quickly(run, quick_recipe("flex", "server.rounds=1", *PLACES["int8"]))
    client = find_models(run)[0]
    export_graft(read_state(run, client=client), tmp_path / "graft")
    export_adapter(read_state(run), tmp_path / "adapter")
    parts = [tmp_path / "adapter", tmp_path / "graft"]
    make_run(parts, tmp_path / "made", model=short_model(), client=None)
    found = []
    for folder in (run, tmp_path / "made"):
        with open_model(read_state(folder, client=client)) as opened:
            found.append(logits_of(opened.model))
    assert torch.equal(*found)


def test_a_folder_of_a_run_in_few_bits_is_measured_as_its_run_is(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    recipe = quick_recipe("fedavg", "server.rounds=1", "evaluation.metrics=loss", *PLACES["int8"])
    run_quickly(run, recipe)
    export_model(read_state(run), out)
    data = tmp_path / "new.jsonl"
    data.write_text('{"instruction": "Greet Mila", "response": "Hello, Mila"}\n')
    own = ("--data", str(data), "--json")
    found = []
    for words in ((str(run), "--global"), (str(out), "--model", short_model())):
        done = CliRunner().invoke(app, ["evaluate", *words, *own])
        assert done.exit_code == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0]["base"] == found[1]["base"]
    assert found[0]["global"]["loss"] == pytest.approx(found[1]["exported"]["loss"], abs=1e-5)
    assert found[0]["base"] != found[0]["global"]


def test_a_cache_of_experts_is_made_once_wherever_a_run_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, elsewhere = tmp_path / "started", tmp_path / "elsewhere"
    started.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(started)
    options = ("model.placement=mapped", "model.expert_cache=cache")
    run_quickly(tmp_path / "run", quick_recipe("flex", "server.rounds=1", *options))
    record_start(tmp_path / "run", Start(directory=str(started)))
    assert list((started / "cache").iterdir())
    monkeypatch.chdir(elsewhere)
    state = read_state(tmp_path / "run")
    with open_model(state) as opened:
        assert opened.generate("Greet Mila", max_new_tokens=2)
    assert not list(elsewhere.iterdir())
    # Elsewhere there is no such folder: a part that is imported has its cache beside its base.
    export_adapter(state, tmp_path / "adapter")
    recipe = parse_recipe(json.loads((tmp_path / "adapter/orchard.json").read_text())["recipe"])
    assert (recipe.model.placement, recipe.model.expert_cache) == ("mapped", "")
