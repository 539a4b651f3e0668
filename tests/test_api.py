"""The Python way in says and does what the command says and does."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import orchard
from federations import QUICK
from orchard.cli import app
from orchard.recipe.reading import option_value, read_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny" / "fedavg.toml"
CHANGES: dict[str, Any] = {
    "client": {"steps": 2, "batch_size": 4},
    "server": {"rounds": 2},
    "evaluation.models": "base,global,local",
    "evaluation.metrics": "loss",
    "evaluation.retention_path": "",
    "evaluation.max_examples": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> orchard.Result:
    recipe = orchard.load_recipe(RECIPE, **CHANGES)
    return orchard.run(recipe, out=tmp_path_factory.mktemp("api") / "run", progress=False)


def test_changes_are_sections_dotted_keys_or_the_seed() -> None:
    changed = orchard.load_recipe(
        RECIPE, seed=3, server={"rounds": 4}, **{"client.lr": 1, "data.path": Path("orchard:world")}
    )
    plain = read_recipe(RECIPE).recipe
    assert (changed.seed, changed.server.rounds, changed.client.lr) == (3, 4, 1.0)
    assert changed.data.path == "orchard:world"
    restored = replace(
        changed,
        seed=plain.seed,
        server=replace(changed.server, rounds=plain.server.rounds),
        client=replace(changed.client, lr=plain.client.lr),
        data=replace(changed.data, path=plain.data.path),
    )
    assert restored == plain


def test_a_packaged_recipe_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert orchard.load_recipe("tiny/fedavg") == read_recipe(RECIPE).recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"server.ronds": 1}, "did you mean server.rounds"),
        ({"server": {"rounds": "two"}}, "server.rounds must be of type int"),
        ({"server.rounds": [1, 2]}, "server.rounds must be a single int, got list"),
        ({"server.tau": 0.1}, "server.tau"),  # nothing in FedAvg reads it
    ],
)
def test_a_bad_change_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        orchard.load_recipe(RECIPE, **changes)


def test_the_command_and_the_call_end_with_the_same_tensors(
    finished: orchard.Result, tmp_path: Path
) -> None:
    given = [
        f"{key}={option_value(orchard.load_recipe(RECIPE, **CHANGES), key)}"
        for key in ("evaluation.models", "evaluation.metrics", "evaluation.max_examples")
    ]
    words = ["run", str(RECIPE), *QUICK, *given, "--out", str(tmp_path / "run")]
    called = CliRunner().invoke(app, words)
    assert called.exit_code == 0, called.output
    assert orchard.load(tmp_path / "run").recipe == orchard.load(finished.folder).recipe
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["shared_digest"] == finished.shared_digest


def test_a_result_is_what_stands_in_its_file(finished: orchard.Result) -> None:
    record = json.loads((finished.folder / "result.json").read_text())
    assert finished.record == record
    for name in ("strategy", "seed", "num_rounds", "metrics", "summary", "seconds"):
        assert getattr(finished, name) == record[name]
    assert list(finished.clients) == list(record["clients"])
    assert list(finished.uplink_bytes_per_round) == record["uplink_bytes_per_round"]
    properties = [n for n, p in inspect.getmembers(orchard.Result) if isinstance(p, property)]
    assert all(getattr(finished, name) is not None for name in properties)


def test_a_result_shows_itself_as_a_table(finished: orchard.Result) -> None:
    lines = repr(finished).splitlines()
    assert lines[0].startswith(f"Result({str(finished.folder)!r}, fedavg, seed 0, 2 rounds")
    for word in (*finished.clients, "global", f"{finished.summary['base']['loss']['mean']:.3f}"):
        assert word in repr(finished)


def test_a_loaded_run_has_recipe_result_and_rows(finished: orchard.Result) -> None:
    run = orchard.load(finished.folder)
    assert run.result == finished
    assert run.num_rounds == finished.num_rounds == 2
    num_clients = len(finished.clients)
    kinds = [row["kind"] for row in run.metrics]
    assert kinds.count("round") == 2
    assert kinds.count("client") == 2 * num_clients
    assert kinds.count("evaluation") == 2 * num_clients  # the base, and what the last round left
    last = {row["client"]: row for row in run.metrics if "global/loss" in row}
    assert {c: row["global/loss"] for c, row in last.items()} == finished.metrics["global"]["loss"]
    assert all(
        isinstance(value, str | int | float) for row in run.metrics for value in row.values()
    )


def test_an_unfinished_run_loads_without_a_result_and_no_run_is_refused(
    finished: orchard.Result, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text((finished.folder / "recipe.toml").read_text())
    run = orchard.load(tmp_path)
    assert (run.result, run.metrics, run.num_rounds) == (None, [], 0)
    with pytest.raises(FileNotFoundError, match=r"run must be a folder with a recipe\.toml"):
        orchard.load(tmp_path / "nowhere")


def test_a_folder_with_a_run_is_refused_and_resumed_when_asked(finished: orchard.Result) -> None:
    recipe = orchard.load_recipe(RECIPE, **CHANGES)
    with pytest.raises(ValueError, match="must be a new folder"):
        orchard.run(recipe, out=finished.folder, progress=False)
    again = orchard.run(recipe, out=finished.folder, resume=True, progress=False)
    assert again.shared_digest == finished.shared_digest


def test_a_tracker_that_fails_is_a_warning_and_changes_nothing(
    finished: orchard.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def begin(self, run: object) -> None:
            raise OSError("no space")

    monkeypatch.setattr("orchard.tracking.trackers.TRACKERS", {"mine": Broken})
    monkeypatch.setattr("orchard.tracking.trackers.require", lambda name, *, to: None)
    recipe = orchard.load_recipe(RECIPE, **CHANGES)
    with pytest.warns(UserWarning, match="tracker mine stopped before any round .*no space"):
        again = orchard.run(recipe, out=finished.folder, resume=True, progress=False, track="mine")
    assert again.metrics == finished.metrics
    assert again.shared_digest == finished.shared_digest


def test_a_plan_names_every_client(finished: orchard.Result) -> None:
    made = orchard.plan(orchard.load_recipe(RECIPE, **CHANGES))
    assert tuple(client.client_id for client in made.clients) == finished.clients


def test_what_the_data_lacks_is_a_warning(tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}", "response": "yes", "category": "a"} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    changes = CHANGES | {"data": {"path": data, "partition": "iid", "num_clients": 2}}
    recipe = orchard.load_recipe(RECIPE, **changes)
    with pytest.warns(UserWarning, match="stand"):
        orchard.run(recipe, out=tmp_path / "run", progress=False)


def test_import_is_light_and_offers_what_it_says() -> None:
    code = (
        "import sys, orchard\n"
        "slow = {'torch', 'transformers', 'numpy', 'datasets', 'typer', 'rich'}\n"
        "heavy = slow & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert all(hasattr(orchard, name) for name in orchard.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
