"""Generated answers are kept by their client, shown beside the right ones, and never sent."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from federations import quick_recipe, run_quickly
from orchard.answers import find_answers
from orchard.cli import app
from orchard.client.answers import keep_answers, read_answers
from orchard.client.store import ClientStore
from orchard.evaluation.quality import Answer
from sites import LocalPost, make_coordinator, make_workers, site_recipe, write_sites

MEASURED = (
    "evaluation.models=base,global,local,personal",
    "evaluation.metrics=rouge_l,chrf,exact_match",
    "evaluation.max_examples=2",
    "evaluation.max_new_tokens=4",
    "server.rounds=1",
    "client.steps=1",
)


def an_answer(text: str = "so", reference: str = "yes") -> Answer:
    return Answer("Is it?", text, reference, {"rouge_l": 0.0})


def keep(store: ClientStore, text: str, *, round_number: int = 1, model: str = "global") -> None:
    keep_answers(
        store,
        [an_answer(text)],
        client_id="north",
        round_number=round_number,
        model=model,
        of="test",
    )


def test_a_round_that_is_run_again_leaves_each_answer_once(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, "base")
    keep(store, "first")
    keep(store, "other", model="personal")
    keep(store, "again")
    keep(store, "next", round_number=2)
    found = [(line["round"], line["model"], line["answer"]) for line in read_answers(tmp_path)]
    assert found == [(1, "personal", "other"), (1, "global", "again"), (2, "global", "next")]


def test_answers_are_for_their_owner_alone(tmp_path: Path) -> None:
    keep(ClientStore(tmp_path, "base"), "secret")
    (path,) = (tmp_path / "answers").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_quickly(folder, quick_recipe("flex", *MEASURED))
    return folder


def test_a_run_keeps_every_answer_with_what_it_scored(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    lines = list(read_answers(run / "clients"))
    assert {line["client"] for line in lines} == set(result["clients"])
    assert {(line["round"], line["model"]) for line in lines} == {
        (0, "base"),
        *((1, model) for model in ("global", "local", "personal")),
    }
    for model, by_metric in result["metrics"].items():
        for metric, values in by_metric.items():
            for client, value in values.items():
                scores = [
                    line["scores"][metric]
                    for line in lines
                    if (line["client"], line["model"]) == (client, model)
                ]
                assert sum(scores) / 2 == pytest.approx(value)


def test_no_answer_is_kept_where_none_is_asked_for(tmp_path: Path) -> None:
    run_quickly(tmp_path, quick_recipe("fedavg", *MEASURED, "evaluation.keep_answers=false"))
    assert not list(read_answers(tmp_path))


def show(*arguments: object, width: int = 60) -> str:
    shown = CliRunner(env={"COLUMNS": str(width)}).invoke(app, ["answers", *map(str, arguments)])
    assert shown.exit_code == 0, shown.output
    return shown.stdout


def test_answers_stand_beside_the_right_ones_at_any_width(run: Path) -> None:
    (first, *_) = find_answers(run)
    text = show(run, "--client", first["client"])
    assert max(map(len, text.splitlines())) <= 60
    assert first["reference"] in " ".join(text.split())
    for model in ("base, round 0", "global, round 1", "local, round 1", "personal, round 1"):
        assert text.count(model) == 2
    assert text.count("test example") == 2
    assert json.loads(show(run, "--json")) == find_answers(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--client", "nobody"), "--client must be of "),
        (("--round", "7"), "--round must be of 0, 1, got 7"),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    arguments: tuple[str, ...], message: str, run: Path
) -> None:
    shown = CliRunner().invoke(app, ["answers", str(run), *arguments])
    assert shown.exit_code == 2
    assert message in shown.stderr


def test_a_folder_without_answers_says_how_to_get_some(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["answers", str(tmp_path)])
    assert shown.exit_code == 2
    assert "evaluation.keep_answers" in shown.stderr


def test_a_terminal_does_not_obey_an_answer(tmp_path: Path) -> None:
    keep(ClientStore(tmp_path, "base"), "\x1b[2Jred \u202eback [bold]é 好")
    text = show(tmp_path)
    assert "\\x1b[2Jred \\x202eback [bold]é 好" in text
    assert "\x1b" not in text


def test_answers_stay_at_their_site(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data")
    crossed: list[bytes] = []
    consent = partial(replace, keeps_answers=True)
    post = LocalPost(make_workers(data, tmp_path / "sites", consent=consent))
    handlers = {site: worker.handle for site, worker in post.workers.items()}
    for site, worker in post.workers.items():

        def handle(header, body, own=handlers[site]):  # type: ignore[no-untyped-def]
            answer, content = own(header, body)
            crossed.append(json.dumps(answer).encode() + content)
            return answer, content

        worker.handle = handle  # type: ignore[method-assign]
    coordinator, begin = make_coordinator(site_recipe("flex", data, *MEASURED), tmp_path / "run")
    coordinator.run_rounds(post, begin, num_sites=2)
    kept = find_answers(tmp_path / "sites")
    assert {line["client"] for line in kept} == set(post.workers)
    assert not list(read_answers(tmp_path / "run"))
    private = {line[part].encode() for line in kept for part in ("prompt", "reference")}
    everything = [*crossed, *(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())]
    assert crossed
    assert not [text for text in private for content in everything if text in content]
