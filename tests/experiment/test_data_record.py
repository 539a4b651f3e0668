"""A run goes on with the data that it began with, in one process and between sites."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from federations import quick_recipe
from orchard.api import prepare
from orchard.communication.refusals import Code
from orchard.deployment.site_worker import SiteWorker
from orchard.engine.exchange import Reply
from orchard.engine.progress import Silent
from orchard.experiment.data_record import DATA_FILE, record_data
from orchard.experiment.preparation import prepare_experiment
from orchard.experiment.run_folder import begin_folder, recorded_as
from orchard.experiment.running import run_experiment
from orchard.recipe.options import Recipe
from orchard.recipe.reading import to_toml
from sites import PATIENT, LocalPost, make_coordinator, make_workers, site_recipe, write_sites


def rows(number: int, *, things: str = "keys") -> list[dict[str, str]]:
    return [
        {"instruction": f"What is in box {n}?", "response": f"Box {n} holds {3 * n} {things}."}
        for n in range(number)
    ]


def write(path: Path, found: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found))


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    changed = (f"data.path={folder}", "data.test_size=0.2", *overrides)
    return quick_recipe("fedavg", "server.rounds=1", "client.steps=1", *changed)


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Path]:
    """Return the data of a run that has begun, with two clients, and the run's folder."""
    for client in ("north", "south"):
        write(tmp_path / "data" / f"{client}.jsonl", rows(20))
    write(tmp_path / "known.jsonl", rows(5))
    recipe = recipe_of(tmp_path / "data", f"evaluation.retention_path={tmp_path / 'known.jsonl'}")
    record_data(tmp_path / "run", prepare_experiment(recipe).digest)
    begin_folder(tmp_path / "run", recorded_as(recipe))
    return tmp_path / "data", tmp_path / "run"


def again(data: Path, run: Path) -> None:
    known = data.parent / "known.jsonl"
    prepare(recipe_of(data, f"evaluation.retention_path={known}"), out=run, resume=True)


def test_a_run_goes_on_with_the_same_data(begun: tuple[Path, Path]) -> None:
    again(*begun)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another answer": (
        lambda data: write(data / "south.jsonl", [*rows(19), *rows(20, things="coins")[19:]]),
        r"changed: 'south' \(still 16 for training and 4 for testing\)",
    ),
    "another order": (
        lambda data: write(data / "south.jsonl", rows(20)[::-1]),
        r"changed: 'south' \(still 16 .*\)",
    ),
    "fewer rows": (
        lambda data: write(data / "north.jsonl", rows(10)),
        r"changed: 'north' \(16 for training and 4 for testing then, 8 for training and 2 for "
        r"testing now\)",
    ),
    "a client more": (lambda data: write(data / "west.jsonl", rows(20)), "new: 'west'"),
    "a client less": (lambda data: (data / "north.jsonl").unlink(), "missing: 'north'"),
    "what the base knew": (
        lambda data: write(data.parent / "known.jsonl", rows(6)),
        r"evaluation\.retention_path differs",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_run_does_not_go_on_with_other_data(
    begun: tuple[Path, Path], change: Callable[[Path], None], message: str
) -> None:
    change(begun[0])
    with pytest.raises(ValueError, match=rf"data must be what it was .*{message}.*; bring back"):
        again(*begun)


def test_options_belong_to_the_data(tmp_path: Path) -> None:
    colors = [{**row, "response": "red", "color": "blue"} for row in rows(20)]
    labels = ("data.labels=red,blue", "data.partition=file")
    digests = []
    for option in (labels, ("data.labels=red,blue,green", labels[1])):
        write(tmp_path / "data" / "north.jsonl", colors)
        digests.append(prepare_experiment(recipe_of(tmp_path / "data", *option)).digest.overall)
    assert digests[0] != digests[1]


def test_a_run_of_an_older_version_does_not_go_on(begun: tuple[Path, Path]) -> None:
    (begun[1] / DATA_FILE).unlink()
    with pytest.raises(ValueError, match="an older version began it; begin anew"):
        again(*begun)


def test_a_run_records_its_data_and_ends_before_its_model_is_loaded(tmp_path: Path) -> None:
    write(tmp_path / "data" / "north.jsonl", rows(20))
    recipe, run = recipe_of(tmp_path / "data"), tmp_path / "run"
    result = run_experiment(prepare_experiment(recipe), folder=run, reporter=Silent())
    assert json.loads((run / DATA_FILE).read_text())["overall"] == result["data_digest"]
    write(tmp_path / "data" / "north.jsonl", rows(12))
    changed = prepare_experiment(recipe)
    # There is no such model to load.
    lost = replace(changed, recipe=replace(recipe, model=replace(recipe.model, path="/none")))
    (run / "recipe.toml").write_text(to_toml(lost.recipe))
    with pytest.raises(ValueError, match=r"data must be what it was .*changed: 'north'"):
        run_experiment(lost, folder=run, reporter=Silent())


# Between sites


def joins(worker: SiteWorker, recipe: Recipe) -> dict[str, Any]:
    header = {"kind": "join", "run": "one", "recipe": to_toml(recipe)}
    return dict(worker.handle(header, b"")[0])


def test_a_site_whose_data_changed_since_it_joined_refuses_and_says_so(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data", num_sites=1)
    (path,) = data.glob("*.jsonl")
    recipe, name = site_recipe("fedavg", data), path.stem

    def started() -> SiteWorker:
        return make_workers(data, tmp_path / "stores")[name]

    answer = joins(started(), recipe)
    assert answer["num_examples"] == 18
    assert joins(started(), recipe) == answer, "the same data joins again"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:12]))
    refused = joins(started(), recipe)["refused"]
    assert refused == Code.DATA_CHANGED
    asked = {
        **{"kind": "round", "run": "one", "recipe": to_toml(recipe), "site": name, "round": 1},
        **{"train": True, "evaluate": [], "index": 0, "num_clients": 1},
    }
    assert started().handle(asked, b"")[0]["refused"] == refused, "also in the middle of a run"
    log = (tmp_path / "stores" / name / "audit.jsonl").read_text()
    assert "data must be what it was when this site's part in run one began" in log
    assert "18 for training and 6 for testing then, 9 for training and 3 for testing now" in log
    path.write_text(whole)
    assert joins(started(), recipe) == answer, "the data is back"
    other = {"kind": "join", "run": "two", "recipe": to_toml(recipe)}
    path.write_text("".join(whole.splitlines(keepends=True)[:12]))
    assert started().handle(other, b"")[0]["num_examples"] == 9, "another run begins anew"


def test_both_sides_say_that_a_site_came_back_with_other_data(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data")
    recipe = site_recipe("fedavg", data, "server.rounds=2")
    workers = make_workers(data, tmp_path / "stores")
    changed = sorted(workers)[0]

    def meddle(site: str, header: Mapping[str, Any], answer: Callable[[], Reply]) -> Reply | None:
        if header["kind"] == "round" and header["round"] == 2 and site == changed:
            path = data / f"{site}.jsonl"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
            workers[site] = make_workers(data, tmp_path / "stores")[site]  # it was started again
        return answer()

    patience = replace(PATIENT, quorum=1, attempts=1)
    coordinator, begin = make_coordinator(recipe, tmp_path / "run", patience=patience)
    coordinator.run_rounds(LocalPost(workers, meddle), begin, num_sites=2)
    for log in (tmp_path / "run", tmp_path / "stores" / changed):
        assert Code.DATA_CHANGED in (log / "audit.jsonl").read_text()
    other = tmp_path / "stores" / sorted(workers)[1] / "audit.jsonl"
    assert "refused" not in other.read_text()


def test_what_is_wrong_with_a_row_stays_at_its_site(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_sites(tmp_path / "data", num_sites=1)
    (path,) = data.glob("*.jsonl")
    path.write_text(path.read_text() + "Mrs. Private has a cold.\n")
    (worker,) = make_workers(data, tmp_path / "stores").values()
    with caplog.at_level("WARNING"):
        refused = joins(worker, site_recipe("fedavg", data))["refused"]
    assert refused == Code.DATA
    assert "line 25 of" in caplog.text
