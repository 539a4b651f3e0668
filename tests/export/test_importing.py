"""Exported parts go back: into a run, into a site's store, as the start of a run, or as a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from federations import quick_recipe, run_quickly, short_model
from orchard.cli import app
from orchard.engine.progress import Silent
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.running import load_model, run_experiment
from orchard.experiment.start_values import starting_values
from orchard.export.parts import export_adapter, export_graft
from orchard.models.stored.conversion import match_checkpoint
from orchard.models.stored.exported_parts import read_adapter, read_part
from orchard.models.stored.loading import load_tokenizer
from orchard.personal.opening import open_model
from orchard.personal.state import ModelState, find_models, read_state
from orchard.recipe.reading import to_toml
from orchard.server.checkpoint import load_checkpoint
from orchard.trees import equal
from sites import LocalPost, make_coordinator, make_workers, site_recipe, write_sites
from tiny_exports import FAMILIES, checkpoint, logits_of, recipe_on, state_of

FLEX = quick_recipe("flex", "server.rounds=1", "strategy.calibration_blocks=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("import") / "run"
    run_quickly(folder, FLEX)
    return folder


@pytest.fixture(scope="module")
def parts(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    export_adapter(read_state(run), folder / "adapter")
    export_graft(read_state(run, client="harbor"), folder / "graft")
    return folder


def told(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def said(state: ModelState) -> torch.Tensor:
    with open_model(state) as opened:
        return logits_of(opened.model)


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.long) for f in FAMILIES[1:])]
)
def test_an_adapter_is_read_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    recipe = recipe_on(checkpoint(family, tmp_path / "base"), family, "fedavg")
    state = state_of(recipe)
    export_adapter(state, tmp_path / "out")
    from orchard.experiment.settings import lora_settings

    view = match_checkpoint(recipe.model.path).whole
    read = read_adapter(read_part(tmp_path / "out"), view, lora_settings(recipe))
    assert equal(read, state.shared)


def test_parts_become_a_run_that_is_asked_served_and_exported(
    run: Path, parts: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    own = ("import", parts / "adapter", parts / "graft", "--into", made)
    code, shown, error = told(*own, "--client", "north", "--model", short_model())
    assert code == 0, error
    assert f"orchard chat {made} --client north" in shown
    assert find_models(made) == ["north"]
    for client, before in (("north", "harbor"), (None, None)):
        state = read_state(made, client=client)
        assert torch.equal(said(state), said(read_state(run, client=before)))
    from orchard.models.stored.loading import load_base
    from orchard.serving.registry import Registry, find_sources

    base = load_base(short_model(), dtype="float32")
    sources = find_sources([made])
    assert list(sources) == ["base", "global", "north"]
    registry = Registry(base.view, base.digest, sources)
    assert registry.values("north").grafts
    code, _, error = told("export", made, "--client", "north", "--out", tmp_path / "out")
    assert code == 0, error
    code, _, error = told("generate", parts / "graft", "Greet Mila")
    assert (code, error.count("\n")) == (2, 1)
    assert "by orchard import" in error
    code, _, error = told("resume", made)
    assert code == 2
    assert error.count("\n") == 1


def test_grafts_alone_do_not_become_a_run(parts: Path, tmp_path: Path) -> None:
    code, _, error = told("import", parts / "graft", "--into", tmp_path / "made")
    assert code == 2
    assert "PART must be an adapter too" in error
    assert not list(tmp_path.iterdir())


def test_a_run_starts_from_an_adapter(run: Path, parts: Path, tmp_path: Path) -> None:
    option = f"server.start={parts / 'adapter'}"
    recipe = quick_recipe("flex", "server.rounds=1", "strategy.calibration_blocks=1", option)
    model = load_model(recipe, load_tokenizer(recipe.model.path))
    before = read_state(run).shared
    start = starting_values(recipe, model.fresh, base_digest=model.base_digest)
    assert equal(start, before)
    assert not equal(model.fresh, before)
    still = replace(recipe, client=replace(recipe.client, lr=1e-12))
    run_experiment(prepare_experiment(still), folder=tmp_path / "run", reporter=Silent())
    state = load_checkpoint(tmp_path / "run" / "checkpoints", about={})
    assert state is not None
    for name, tensor in before.items():
        torch.testing.assert_close(state.shared[name], tensor, atol=1e-6, rtol=0)


def test_a_site_takes_grafts_into_its_store(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data")
    options = ("server.rounds=2", "strategy.calibration_blocks=1", "evaluation.models=personal")
    recipe = site_recipe("flex", data, *options)
    workers = make_workers(data, tmp_path / "stores")
    coordinator, begin = make_coordinator(recipe, tmp_path / "run")
    coordinator.run_rounds(LocalPost(workers), begin, num_sites=2)
    (tmp_path / "run" / "recipe.toml").write_text(to_toml(recipe))
    first, second = (tmp_path / "stores" / name for name in ("harbor", "hill"))
    shutil.rmtree(data)
    code, shown, error = told("export", first, "--graft", "--out", tmp_path / "graft")
    assert code == 0, error
    size = sum(file.stat().st_size for file in (tmp_path / "graft").iterdir())
    assert f"{tmp_path / 'graft'}: {size:,} bytes" in shown
    before = read_state(second, client="hill")
    code, shown, error = told("import", tmp_path / "graft", "--into", second)
    assert code == 0, error
    assert "hill" in shown
    after, given = read_state(second, client="hill"), read_state(first, client="harbor")
    assert equal(after.own, given.own)
    assert not equal(after.own, before.own)
    code, _, error = told("export", second, "--out", tmp_path / "whole")  # without a coordinator
    assert code == 0, error
    assert json.loads((tmp_path / "whole" / "orchard.json").read_text())["client"] == "hill"


def on_another_base(part: Path) -> None:
    for file in (part / "orchard.json", part / "graft.json"):
        if file.is_file():
            about = json.loads(file.read_text())
            file.write_text(json.dumps(about | {"base_digest": "ab" * 32}))


def cut_off(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])


def of_another_rank(part: Path) -> None:
    file = part / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 3}))


def not_finite(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    tensors = load_file(file)
    tensors[min(tensors)].fill_(torch.nan)
    save_file(tensors, file)


def without_words(part: Path) -> None:
    (part / "orchard.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (on_another_base, "abababababab"),
        (cut_off, "must be a whole safetensors file"),
        (not_finite, "must hold finite values"),
        (of_another_rank, "model.lora_rank and model.lora_alpha must be 3"),
        (without_words, "must be as orchard export wrote it"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(
    parts: Path, change: Callable[[Path], None], wanted: str, tmp_path: Path
) -> None:
    part = Path(shutil.copytree(parts / "adapter", tmp_path / "part"))
    change(part)
    made = tmp_path / "made"
    code, _, error = told("import", part, "--into", made, "--model", short_model())
    assert (code, error.count("\n")) == (2, 1)
    assert wanted in error
    start = quick_recipe("fedavg", f"server.start={part}")
    with pytest.raises(ValueError, match=wanted):
        run_experiment(prepare_experiment(start), folder=tmp_path / "run", reporter=Silent())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "run") == ["part"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("GONE", "--into", "RUN"), "must be a folder of orchard export"),
        (("RUN", "--into", "RUN"), "must be a folder of orchard export"),
        (("ADAPTER", "--into", "RUN"), "server.start"),
        (("GRAFT", "ADAPTER", "--into", "RUN"), "PART must be one folder"),
        (("GRAFT", "--into", "RUN", "--client", "harbour"), "did you mean harbor"),
        (("GRAFT", "--into", "RUN", "--model", "x"), "--model must be left out"),
        (("GRAFT", "GRAFT", "--into", "NEW"), "one adapter and grafts of one client"),
        (("ADAPTER", "--into", "NEW", "--model", "GONE"), "GONE"),
    ],
)
def test_a_bad_import_is_one_line(
    run: Path, parts: Path, words: tuple[str, ...], wanted: str, tmp_path: Path
) -> None:
    places = {
        "RUN": run,
        "ADAPTER": parts / "adapter",
        "GRAFT": parts / "graft",
        "NEW": tmp_path / "new",
        "GONE": tmp_path / "GONE",
    }
    code, _, error = told("import", *(places.get(word, word) for word in words))
    assert (code, error.count("\n")) == (2, 1)
    assert wanted in error
    assert not list(tmp_path.iterdir())
