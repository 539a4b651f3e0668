"""What leaves a site whatever a coordinator asks: no cell, no path, no number of few rows."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federations import short_model
from orchard.client.client import Client
from orchard.client.requirements import Requirements
from orchard.communication.audit import read_audit
from orchard.communication.messages import LocalSettings, decode_update, encode_task
from orchard.communication.refusals import Code, explain
from orchard.data.encoded import Encoded
from orchard.data.examples import Example
from orchard.data.templates import Wording
from orchard.deployment import fits
from orchard.deployment.consent import Consent, SiteSettings
from orchard.deployment.measures import let_out, rounded, rows_read
from orchard.deployment.site_worker import SiteWorker
from orchard.experiment import encoding, preparation
from orchard.experiment.budgets import build_requirements
from orchard.experiment.methods import METHODS
from orchard.experiment.running import build_schedule, load_model
from orchard.experiment.settings import lora_settings
from orchard.models.stored.loading import check_model, load_tokenizer
from orchard.recipe.options import Recipe
from orchard.recipe.reading import format_value, known_options, option_value, to_toml
from sites import changed, same, site_recipe

CANARY, ROWS, HELD_OUT = "zyzzyva", 50, 20
COLUMNS = ("instruction", "response", "context", "category", "patient", "diagnosis", "score")
KEPT = ("joined", "asked", "sent", "refused", "failed", "loaded", "changed", "damaged")


def write_rows(folder: Path) -> Path:
    """Write a file in every cell of which, and in whose path, is a canary."""
    path = folder / f"{CANARY}-folder" / "north.jsonl"
    path.parent.mkdir(parents=True)
    rows = [
        {
            column: f"{CANARY}{number}{column}" if column != "score" else 7_000_000 + number
            for column in COLUMNS
        }
        for number in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_worker(folder: Path, data: Path, **consent: Any) -> SiteWorker:
    store = folder / f"{CANARY}-store"
    own = Consent(str(data), model=short_model(), **consent)
    return SiteWorker(SiteSettings("north", store, store / "socket", own))


@cache
def asked_recipe(**options: Any) -> Recipe:
    whole = site_recipe(
        "fedavg",
        Path("elsewhere"),
        *("evaluation.models=base,global,local,personal", "evaluation.metrics=loss"),
        *("evaluation.every=1", "client.batch_size=8", "data.max_tokens=32", "client.steps=3"),
    )
    whole = changed(whole, "data.test_size", 0.4)
    for key, value in options.items():
        whole = changed(whole, key.replace("__", "."), value)
    return whole


def join(recipe: Recipe, *, run: str = "r") -> dict[str, Any]:
    return {"kind": "join", "run": run, "recipe": to_toml(recipe)}


def round_of(recipe: Recipe, number: int = 1, **own: Any) -> dict[str, Any]:
    evaluate = ["base"] if number == 1 else ["global", "personal"]
    return {
        **join(recipe),
        "kind": "round",
        "site": "north",
        "index": 0,
        "num_clients": 1,
        "round": number,
        "evaluate": evaluate,
        "train": True,
        **own,
    }


@cache
def fresh() -> Mapping[str, torch.Tensor]:
    recipe = asked_recipe()
    return dict(load_model(recipe, load_tokenizer(recipe.model.path)).fresh)


def task_of(recipe: Recipe, number: int = 1, *, move: float = 0.0, **own: Any) -> bytes:
    shared = {name: (tensor + move).bfloat16() for name, tensor in fresh().items()}
    task = build_schedule(recipe).task(number, shared)
    return encode_task(replace(task, **own))


@pytest.fixture
def worker(tmp_path: Path) -> SiteWorker:
    return make_worker(tmp_path, write_rows(tmp_path))


def events(worker: SiteWorker) -> list[dict[str, Any]]:
    return read_audit(worker._audit.path)


def test_a_round_leaves_rounded_means_and_no_more(worker: SiteWorker) -> None:
    recipe = asked_recipe(client__steps=4)
    assert worker.handle(join(recipe), b"")[0] == {"site": "north", "num_examples": ROWS - HELD_OUT}
    reply, body = worker.handle(round_of(recipe), task_of(recipe))
    assert reply.keys() == {"site", "base_digest", "evaluation", "evaluation_seconds"}
    update = decode_update(body)
    values = {**reply["evaluation"], **update.metrics}
    assert {"base/loss", "local/loss", "client/train_loss"} <= values.keys()
    assert all(value == round(value, 4) for value in values.values())
    sent = events(worker)[-1]
    # The owner reads in the audit what left, and with which settings it was trained.
    assert sent["evaluation"] == reply["evaluation"]
    assert sent["metrics"] == dict(update.metrics)
    assert sent["settings"] == {"steps": 4, "epochs": 0, "learning_rate": recipe.client.lr}


def test_no_update_is_of_few_rows(worker: SiteWorker) -> None:
    reply, _ = worker.handle(join(asked_recipe(client__steps=2)), b"")  # 16 rows
    assert reply == {"refused": "few_rows", "option": "client.steps", "site": "north"}
    assert "refused" not in worker.handle(join(asked_recipe(client__steps=3)), b"")[0]


@pytest.mark.parametrize(("blocks", "is_told"), [(1, False), (80, True)])
def test_what_grafts_were_chosen_on_is_not_told_of_few_rows(
    blocks: int, is_told: bool, worker: SiteWorker
) -> None:
    recipe = asked_recipe(strategy__name="flex", strategy__calibration_blocks=blocks)
    recipe = changed(recipe, "strategy.calibration_tokens", 8)
    worker.handle(join(recipe), b"")
    _, body = worker.handle(round_of(recipe), task_of(recipe))
    metrics = decode_update(body).metrics
    assert "client/train_loss" in metrics
    assert any(name.startswith("client/graft_") for name in metrics) is is_told


def test_what_experts_were_ranked_on_is_not_told_of_few_rows(worker: SiteWorker) -> None:
    recipe = asked_recipe(strategy__name="fedmoe", selection__scoring_batches=1)
    client = cast(Client, SimpleNamespace(num_examples=30, training=recipe.client))
    rows = rows_read(recipe, client, LocalSettings(3, 0, 0.1))
    metrics = {"client/active_share": 0.5, "client/train_loss": 1.0, "local/loss": 1.0}
    assert let_out(metrics, worker._consent, rows=rows).keys() == {
        "client/train_loss",
        "local/loss",
    }
    more = changed(recipe, "selection.scoring_batches", 3)
    rows = rows_read(more, client, LocalSettings(3, 0, 0.1))
    assert let_out(metrics, worker._consent, rows=rows).keys() == metrics.keys()


@given(value=st.floats(-1e30, 1e30), decimals=st.integers(0, 8))
def test_no_size_of_a_value_makes_it_more_exact(value: float, decimals: int) -> None:
    (found,) = rounded({"x": value}, Consent("", decimals=decimals)).values()
    assert found == round(found, decimals)
    if 10 <= abs(found) < 1e15:
        assert float(f"{found:.{decimals + 1}e}") == found


def test_a_site_says_its_rows_as_when_it_joined() -> None:
    values = {"client/num_examples": 1_234_567.0}
    assert rounded(values, Consent("", decimals=0)) == values


@pytest.mark.parametrize("size", [1.0, 19.0, 31.0])
def test_no_split_leaves_few_rows_on_one_side(size: float, worker: SiteWorker) -> None:
    reply, _ = worker.handle(join(asked_recipe(data__test_size=size)), b"")
    assert reply == {"refused": "few_rows", "option": "data.test_size", "site": "north"}


def test_few_drawn_test_rows_are_few_rows(worker: SiteWorker) -> None:
    reply, _ = worker.handle(join(asked_recipe(evaluation__max_examples=19)), b"")
    assert reply["refused"] == "few_rows"
    reply, _ = worker.handle(join(asked_recipe(evaluation__max_examples=20)), b"")
    assert reply["num_examples"] == ROWS - HELD_OUT


def other_value(key: str) -> Any:
    kind, entry = known_options()[key]
    given = {
        "data.conventions": "answer_form",  # the other needs labels
        "data.test_size": 0.5,
        "data.max_tokens": 33,
        "evaluation.max_examples": 20,
    }
    if key in given:
        return given[key]
    if choices := entry.metadata["choices"]:
        return next(one for one in choices if one != option_value(asked_recipe(), key))
    if kind is str:
        return "diagnosis"
    if kind is bool:
        return True
    return (entry.metadata["minimum"] or 0) + 1


def owned() -> list[str]:
    from orchard.deployment.terms import term_keys

    return list(term_keys())


@pytest.mark.parametrize("key", owned())
def test_no_later_request_reads_the_rows_otherwise(key: str, joined: SiteWorker) -> None:
    later = changed(asked_recipe(), key, other_value(key))
    for run in ("r", "another"):
        reply, _ = joined.handle(join(later, run=run), b"")
        assert reply == {"refused": "terms", "option": key, "site": "north"}
    reply, _ = joined.handle(round_of(later), task_of(later))
    assert reply["refused"] == "terms"


def test_the_split_is_the_sites_whatever_seed_a_run_has(worker: SiteWorker) -> None:
    first, other = asked_recipe(), replace(asked_recipe(), seed=7)
    held_out = []
    for run, recipe in (("a", first), ("b", other)):
        worker.handle(join(recipe, run=run), b"")
        worker.handle({**round_of(recipe), "run": run}, task_of(recipe))
        session = worker._sessions.last()
        assert session
        held_out.append([example.reference for example in session.client.test])
    assert held_out[0] == held_out[1]


def test_the_owners_own_data_section_is_the_one_that_counts(tmp_path: Path) -> None:
    data = write_rows(tmp_path)
    own = tmp_path / "own.toml"
    own.write_text('seed = 3\n[data]\nresponse = "category"\ntest_size = 0.5\ntemplate = "plain"\n')
    worker = make_worker(tmp_path, data, data_recipe=str(own))
    recipe = asked_recipe(data__response="diagnosis")
    assert worker.handle(join(recipe), b"")[0]["num_examples"] == 25
    worker.handle(round_of(recipe), task_of(recipe))
    session = worker._sessions.last()
    assert session
    assert {example.reference[-8:] for example in session.client.test} == {"category"}
    asked = {"data.response", "data.test_size"}
    assert asked <= set(events(worker)[0]["own"])  # and the owner reads that it was so
    labeled = changed(recipe, "data.labels", "yes,no")
    assert worker.handle(join(labeled, run="s"), b"")[0] == {
        "refused": "task_kind",
        "option": "data.labels",
        "site": "north",
    }
    own.write_text('[model]\npath = "elsewhere"\n')
    with pytest.raises(ValueError, match=r"^--data-recipe must say how"):
        read_terms(own)


def read_terms(path: Path) -> object:
    from orchard.deployment.terms import read_own_terms

    return read_own_terms(path)


def test_tries_to_read_the_rows_are_counted(worker: SiteWorker) -> None:
    refused = [
        worker.handle(join(asked_recipe(data__labels=f"sick,well,{number}")), b"")[0]["refused"]
        for number in range(12)
    ]
    assert refused == ["data"] * 10 + ["data_tries"] * 2


def test_tries_that_leave_few_rows_are_counted(worker: SiteWorker) -> None:
    """Which rows pass a filter tells of them, whether they are enough or not."""
    refused = []
    for number in range(12):
        few = ",".join(f"{CANARY}{row}response" for row in range(number, number + 3))
        recipe = asked_recipe(data__labels=few, data__bad_rows="skip")
        refused.append(worker.handle(join(recipe), b"")[0]["refused"])
    assert refused == ["few_rows"] * 10 + ["data_tries"] * 2


@pytest.mark.parametrize(
    ("own", "code"),
    [
        ({"round": 3}, "round"),
        ({"round": 4, "train": False, "evaluate": ["global"]}, "round"),
        ({"evaluate": ["global"]}, "evaluation"),
        ({"round": 2, "evaluate": ["base"]}, "evaluation"),
        ({"run": "never joined"}, "not_joined"),
        ({"index": 1}, "request"),
        ({"evaluate": ["diagnosis"]}, "request"),
    ],
)
def test_a_request_that_the_recipe_does_not_make_is_refused(
    own: dict[str, Any], code: str, worker: SiteWorker
) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    reply, body = worker.handle({**round_of(recipe), **own}, task_of(recipe))
    assert reply["refused"] == code
    assert body == b""


@pytest.mark.parametrize(
    ("own", "code"),
    [
        ({"settings": LocalSettings(1, 0, 5.0)}, "settings"),
        ({"settings": LocalSettings(1000, 0, 4e-5)}, "settings"),
        ({"settings": LocalSettings(0, 1, 4e-5)}, "settings"),
        ({"round_number": 2}, "round"),
    ],
)
def test_steps_and_learning_rate_are_the_recipes(
    own: dict[str, Any], code: str, worker: SiteWorker
) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    reply, body = worker.handle(round_of(recipe), task_of(recipe, **own))
    assert (reply["refused"], body) == (code, b"")


@pytest.mark.parametrize("kind", ["a name less", "a name more", "a shape", "integers", "nothing"])
def test_a_task_holds_the_tree_of_the_model(kind: str, worker: SiteWorker) -> None:
    recipe, shared = asked_recipe(), dict(fresh())
    name = min(shared)
    shared = {
        "a name less": {key: value for key, value in shared.items() if key != name},
        "a name more": {**shared, "other": torch.zeros(3)},
        "a shape": {**shared, name: torch.zeros(3)},
        "integers": {**shared, name: shared[name].to(torch.int64)},
        "nothing": {},
    }[kind]
    worker.handle(join(recipe), b"")
    body = encode_task(build_schedule(recipe).task(1, shared))
    reply, update = worker.handle(round_of(recipe), body)
    assert (reply.get("refused"), update) == ("request", b"")


def test_a_task_longer_than_the_tree_is_not_read(
    worker: SiteWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    monkeypatch.setattr("orchard.deployment.site_worker.read_task", lambda *given: 1 / 0)
    reply, _ = worker.handle(round_of(recipe), task_of(recipe) + bytes(3_000_000))
    assert reply["refused"] == "request"


def test_a_run_keeps_the_recipe_that_the_site_joined_with(worker: SiteWorker) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    other = changed(recipe, "client.steps", 4)
    for header in (join(other), round_of(other)):
        assert worker.handle(header, task_of(other))[0]["refused"] == "recipe_changed"
    # How long a coordinator waits is its own.
    patient = changed(recipe, "deployment.round_seconds", 5.0)
    assert "refused" not in worker.handle(round_of(patient), task_of(recipe))[0]


def test_a_round_tells_of_few_global_trees(worker: SiteWorker) -> None:
    recipe = asked_recipe(evaluation__every=0)
    worker.handle(join(recipe), b"")
    header = round_of(recipe, evaluate=[])
    first, again = (decode_update(worker.handle(header, task_of(recipe))[1]) for _ in range(2))
    assert same(first.delta, again.delta)
    assert "refused" not in worker.handle(header, task_of(recipe, move=1e-2))[0]
    reply, body = worker.handle(header, task_of(recipe, move=2e-2))
    assert (reply["refused"], reply["option"], body) == ("repeated", "--trees-per-round", b"")
    # Also by a worker that was started again: it is on the disk.
    started_again = SiteWorker(worker._settings)
    assert started_again.handle(header, task_of(recipe, move=3e-2))[0]["refused"] == "repeated"
    assert "refused" not in started_again.handle(header, task_of(recipe))[0]


def test_a_site_is_asked_so_often_in_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whoever asks more often fills no audit."""
    now = 1000.0
    worker = make_worker(tmp_path, write_rows(tmp_path), requests_per_hour=3)
    monkeypatch.setattr(worker._pace, "_clock", lambda: now)
    asked: list[dict[str, Any]] = [join(asked_recipe()), {"kind": "what"}, join(asked_recipe())]
    said = [worker.handle(header, b"")[0].get("refused") for header in asked * 10]
    assert said == [None, "request", None, *["rate"] * 27]
    assert worker.handle({"kind": "alive"}, b"")[0] == {"site": "north"}
    refused = [event for event in events(worker) if event["event"] == "refused"]
    assert [event["refused"] for event in refused] == ["request", "rate"]
    assert refused[-1]["option"] == "--requests-per-hour"
    now += 3600.0
    assert "refused" not in worker.handle(join(asked_recipe()), b"")[0]


def test_the_audit_says_how_many_global_trees_a_round_came_with(worker: SiteWorker) -> None:
    recipe = asked_recipe(evaluation__every=0)
    worker.handle(join(recipe), b"")
    header = round_of(recipe, evaluate=[])
    for move in (0.0, 0.0, 1e-2):
        worker.handle(header, task_of(recipe, move=move))
    said = [event["trees"] for event in events(worker) if event["event"] == "sent"]
    assert said == [f"{number} of at most 2 in this round" for number in (1, 1, 2)]


@pytest.mark.parametrize("is_said", [False, True])
@pytest.mark.parametrize(
    ("training", "measuring", "cap", "option"),
    [
        (None, None, 10**10, None),
        (None, None, 10**6, "client.batch_size"),
        (1001, 10, 1000, "client.batch_size"),
        (10, 1001, 1000, "evaluation.batch_size"),
        (1000, 1000, 1000, None),
    ],
)
def test_what_does_not_fit_is_not_joined(
    training: int | None,
    measuring: int | None,
    cap: int,
    option: str | None,
    is_said: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without --memory nothing was predicted, and measuring was not with it."""
    own = {"memory": f"{cap}"} if is_said else {}
    if not is_said:
        monkeypatch.setattr(fits, "machine_memory_bytes", lambda: cap)
    if training is not None:
        peak = SimpleNamespace(total=training)
        monkeypatch.setattr(Requirements, "peak", lambda self, budget: peak)
        monkeypatch.setattr(Requirements, "evaluation", lambda self, **own: measuring)
    worker = make_worker(tmp_path, write_rows(tmp_path), **own)
    reply = worker.handle(join(asked_recipe()), b"")[0]
    expected = (None, None) if option is None else ("memory", option)
    if is_said and option == "client.batch_size":  # as before the rows were read
        expected = ("memory", "strategy.name")
    assert (reply.get("refused"), reply.get("option")) == expected


def test_measuring_takes_more_with_more_at_a_time() -> None:
    recipe = asked_recipe()
    view = check_model(recipe.model.path, lora_settings(recipe))
    needs = build_requirements(recipe, view).evaluation
    own = {"batch_size": 8, "num_tokens": 64, "num_answered": 8, "num_new": 4}
    for key in own:
        assert needs(**{**own, key: 2 * own[key]}) > needs(**own)


def test_a_list_of_budgets_is_looked_at_once_it_is_known_whose_is_whose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(asked_recipe(evaluation__models=""), "strategy.name", "fedavg_random")
    recipe = changed(recipe, "model.lora_targets", "experts")
    recipe = changed(changed(recipe, "client.budget", "2,100%"), "client.batch_size", 8)
    worker = make_worker(tmp_path, write_rows(tmp_path))
    seen: list[int] = []

    def peak(self: Requirements, budget: int) -> Any:
        seen.append(budget)
        return SimpleNamespace(total=10**9 if budget > 2 else 1)

    monkeypatch.setattr(Requirements, "peak", peak)
    monkeypatch.setattr(fits, "machine_memory_bytes", lambda: 10**8)
    assert "refused" not in worker.handle(join(recipe), b"")[0]
    header = round_of(recipe, evaluate=[], index=1, num_clients=2)
    assert worker.handle(header, task_of(recipe))[0]["refused"] == "memory"
    assert seen == [2, 16]


def test_new_runs_are_counted_by_the_day(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, write_rows(tmp_path), runs_per_day=3)
    replies = [worker.handle(join(asked_recipe(), run=f"{n}"), b"")[0] for n in range(5)]
    assert [reply.get("refused") for reply in replies] == [None, None, None, "runs", "runs"]
    assert "refused" not in worker.handle(join(asked_recipe(), run="1"), b"")[0]
    kept = [path.name for path in (worker._settings.store / "personal").iterdir()]
    assert sorted(kept) == ["0", "1", "2"]  # what is refused leaves nothing on the disk


def test_a_site_keeps_its_place_in_a_run(worker: SiteWorker) -> None:
    recipe = asked_recipe(evaluation__models="")
    worker.handle(join(recipe), b"")
    header = round_of(recipe, evaluate=[], num_clients=3)
    assert "refused" not in worker.handle(header, task_of(recipe))[0]
    for own in ({"index": 1}, {"num_clients": 2}):
        reply, body = SiteWorker(worker._settings).handle({**header, **own}, task_of(recipe))
        assert (reply["refused"], body) == ("site", b"")


def test_a_change_of_consent_between_rounds_is_said_on_both_sides(worker: SiteWorker) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    assert "changed" not in worker.handle(round_of(recipe), task_of(recipe))[0]
    own = worker._settings
    other = SiteWorker(replace(own, consent=replace(own.consent, decimals=2)))
    reply, _ = other.handle(round_of(recipe), task_of(recipe))
    assert reply["changed"] == ["consent"]
    assert [event["what"] for event in events(other) if event["event"] == "changed"] == ["consent"]
    assert "changed" not in other.handle(round_of(recipe), task_of(recipe))[0]  # once


def test_another_base_than_the_run_began_with_is_refused(worker: SiteWorker) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    worker.handle(round_of(recipe), task_of(recipe))
    own = worker._settings
    other = SiteWorker(replace(own, consent=replace(own.consent, model="orchard:tiny")))
    reply, body = other.handle(round_of(recipe), task_of(recipe))
    assert (reply["refused"], reply["option"], body) == ("base_changed", "--model", b"")


def test_other_data_than_the_run_began_with_is_refused(worker: SiteWorker) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    with Path(worker._consent.data).open("a") as file:
        file.write(json.dumps(dict.fromkeys(COLUMNS, f"{CANARY}more")) + "\n")
    again = SiteWorker(worker._settings)
    for header in (join(recipe), round_of(recipe)):
        reply, _ = again.handle(header, task_of(recipe))
        assert reply == {"refused": "data_changed", "option": "", "site": "north"}


def test_data_that_change_under_a_warm_worker_are_noticed(worker: SiteWorker) -> None:
    recipe, path = asked_recipe(evaluation__models=""), Path(worker._consent.data)
    header = round_of(recipe, evaluate=[])
    worker.handle(join(recipe), b"")
    assert "refused" not in worker.handle(header, task_of(recipe))[0]
    before = path.read_bytes()
    few = b"".join(before.splitlines(keepends=True)[:10])
    for other in (before.replace(b"zyzzyva1r", b"zyzzyva1s"), few):
        path.write_bytes(other)
        reply, body = worker.handle(header, task_of(recipe))
        assert reply == {"refused": "data_changed", "option": "", "site": "north"}
        assert body == b""
        assert events(worker)[-1]["event"] == "refused"  # and the owner reads it
    path.write_bytes(before)
    assert "refused" not in worker.handle(header, task_of(recipe))[0]


@pytest.mark.parametrize("keeps", [False, True])
def test_answers_over_rows_are_kept_where_the_owner_says_so(keeps: bool, tmp_path: Path) -> None:
    worker = make_worker(tmp_path, write_rows(tmp_path), keeps_answers=keeps)
    recipe = asked_recipe(evaluation__models="base", evaluation__metrics="exact_match")
    recipe = changed(recipe, "evaluation.max_new_tokens", 1)
    assert recipe.evaluation.keep_answers  # the coordinator asks for it either way
    looking = SiteWorker(replace(worker._settings, only_looks=True))
    looking.handle(join(recipe), b"")
    report = (worker._settings.store / "dry_run.txt").read_text()
    assert ("answers that are generated" in report) is keeps
    worker.handle(join(recipe), b"")
    assert "evaluation" in worker.handle(round_of(recipe, train=False), task_of(recipe))[0]
    assert any(worker._settings.store.rglob("*answers*")) is keeps


def test_a_damaged_personal_file_is_named_here_and_said_there(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, write_rows(tmp_path))
    recipe = asked_recipe(strategy__name="scaffold", evaluation__models="", server__rounds=3)
    recipe = changed(recipe, "communication.dtype", "float32")
    worker.handle(join(recipe), b"")

    def ask(number: int) -> tuple[Mapping[str, Any], bytes]:
        shared = dict(fresh())
        shared |= {f"control.{name}": torch.zeros_like(t) for name, t in fresh().items()}
        task = build_schedule(recipe).task(number, shared)
        return worker.handle(round_of(recipe, number, evaluate=[]), encode_task(task))

    assert "refused" not in ask(1)[0], events(worker)[-1]
    assert "refused" not in ask(2)[0]
    folder = worker._settings.store / "personal" / "r" / "north"
    newest = folder / "round_000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    assert ask(3)[0] == {"refused": "state", "option": "", "site": "north"}
    damaged = events(worker)[-1]
    assert damaged["event"] == "damaged"
    assert damaged["file"].endswith("round_000002.safetensors")
    assert damaged["goes_on_with"] == "the version of round 1"
    assert "refused" not in ask(3)[0]  # said; now from the last good one


def test_a_failure_is_a_code(worker: SiteWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    for error, code in (
        (RuntimeError(f"{CANARY} in {worker._settings.store}"), "failed"),
        (FloatingPointError(CANARY), "diverged"),
        (MemoryError(CANARY), "no_memory"),
        (RuntimeError(f"CUDA out of memory {CANARY}"), "no_memory"),
        (OSError(28, CANARY), "no_space"),
    ):

        def fail(*given: Any, error: Exception = error, **named: Any) -> Any:
            raise error

        monkeypatch.setattr("orchard.deployment.site_worker.train_client", fail)
        reply, body = worker.handle(round_of(recipe), task_of(recipe))
        assert (reply, body) == ({"error": code}, b"")
        assert CANARY in events(worker)[-1]["reason"]  # the owner has the words


def test_no_request_makes_an_audit_long(worker: SiteWorker) -> None:
    recipe = asked_recipe()
    worker.handle(join(recipe), b"")
    before = worker._audit.path.stat().st_size
    for own in (
        {"run": "x" * 5_000_000},
        {"evaluate": ["base"] * 1_000_000},
        {"evaluate": ["y" * 5_000_000]},
        {"z" * 5_000_000: 1},
        {"kind": "k" * 5_000_000},
        {"recipe": "n" * 5_000_000},
        {"recipe": "n" * 60_000 + " = 1"},
        {"methods": {"m" * 5_000_000: "0"}},
        {"recipe": to_toml(changed(recipe, "strategy.name", "s" * 300_000))},
    ):
        worker.handle({**round_of(recipe), **own}, b"")
    assert worker._audit.path.stat().st_size - before < 20_000


def test_every_code_is_explained() -> None:
    for code in Code:
        assert str(code) in explain(str(code), "data.path")
    assert explain("\x1b[31m" + "x" * 9000).isprintable()


def test_the_store_is_its_users_alone(tmp_path: Path) -> None:
    from orchard.deployment.private_files import make_private

    store = tmp_path / "store"
    (store / "personal" / "run").mkdir(parents=True, mode=0o755)
    file = store / "personal" / "run" / "round_000001.safetensors"
    outside = tmp_path / "outside"
    for path in (file, outside):
        path.touch(mode=0o644)
        path.chmod(0o644)
    (store / "link").symlink_to(outside)
    store.chmod(0o755)
    make_private(store)
    for path, mode in ((store, 0o700), (file.parent, 0o700), (file, 0o600), (outside, 0o644)):
        assert stat.S_IMODE(os.stat(path).st_mode) == mode


def test_an_owner_sees_all_of_it_before_anything_is_joined(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, write_rows(tmp_path), limits={"client.steps": 7})
    looking = SiteWorker(replace(worker._settings, only_looks=True))
    recipe = asked_recipe(data__response="diagnosis")
    for header in (join(recipe), round_of(recipe)):
        assert looking.handle(header, task_of(recipe)) == ({"error": "looking"}, b"")
    report = (worker._settings.store / "dry_run.txt").read_text()
    for said in (
        *("run r asks:", "method fedavg", "2 rounds of 3 steps of 8 x 1 rows", "measures loss"),
        *(
            f"{ROWS - HELD_OUT} rows to train on, {HELD_OUT} held out",
            'data.response = "diagnosis"',
        ),
        *("would be sent:", "an update of at most", "means over 20 rows or more, to 4 digits"),
        *("would be kept:", "would cost:", "parameters, 48 rows", "at the peak of training"),
        *("client.steps <= 7", f'data.path = "{worker._consent.data}"'),
    ):
        assert said in report
    # Nothing is agreed on, and nothing was joined.
    assert not (worker._settings.store / "agreed.json").exists()
    assert not (worker._settings.store / "runs").exists()
    assert looking.handle(join(asked_recipe(client__steps=8)), b"")[0] == {"error": "looking"}
    report = (worker._settings.store / "dry_run.txt").read_text()
    assert "the site would refuse: client.steps must be at most 7" in report
    assert "num_examples" in worker.handle(join(asked_recipe()), b"")[0]


# Any recipe, any task.

_TEXTS = (
    *("", *COLUMNS, "{patient}", "{diagnosis} {score}", "patient,diagnosis", f"{CANARY}1patient"),
    *("sick,well", "/etc/passwd", "orchard:world", "orchard:facts", "\ud800", "\x1b[2J", "../.."),
)
_KEYS = sorted(known_options())
_OF_RUNS = [key for key in _KEYS if not key.startswith(("data.", "model.path"))]
_NUMBERS = (0, 1, 2, 19, 20, 29, 30, 31, -1, 10**6, 1e-9, 0.5, 0.99, 1e30, True)


@st.composite
def values(draw: st.DrawFn, key: str) -> Any:
    """Return a value for an option: mostly one that it can have."""
    kind, entry = known_options()[key]
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([*_TEXTS, *_NUMBERS]))
    if key == "strategy.name":
        return draw(st.sampled_from(sorted(METHODS)))
    if entry.metadata.get("choices"):
        return draw(st.sampled_from(list(entry.metadata["choices"])))
    if kind is bool:
        return draw(st.booleans())
    if kind in (int, float):
        own = option_value(asked_recipe(), key)
        return kind(draw(st.sampled_from([own, own, 1, 2, 3, 20])))
    if key in ("evaluation.models", "evaluation.metrics"):
        return draw(st.sampled_from(["", "loss", "base,global", "local", "loss,rouge_l"]))
    return draw(st.sampled_from(_TEXTS))


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """Return the text of a recipe in which some options are others; at times no recipe."""
    lines = to_toml(asked_recipe()).split("\n")
    keys = _OF_RUNS if draw(st.integers(0, 3)) else _KEYS
    for key in draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
        section, _, name = key.rpartition(".")
        start = lines.index(f"[{section}]") if section else 0
        place = next(i for i in range(start, len(lines)) if lines[i].startswith(f"{name} ="))
        lines[place] = f"{name} = {format_value(draw(values(key)))}"
    text = "\n".join(lines)
    broken = [text[: len(text) // 2], f"{text}\n[x", ""]
    return draw(st.sampled_from(broken)) if draw(st.integers(0, 9)) == 0 else text


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["round", "round", "round", "join"]))
    header = round_of(asked_recipe()) if kind == "round" else join(asked_recipe())
    if draw(st.integers(0, 3)):
        header["recipe"] = draw(recipes())
        header["run"] = hashlib.sha256(header["recipe"].encode("utf-8", "replace")).hexdigest()[:16]
    if kind == "round" and draw(st.booleans()):
        header["round"], header["evaluate"] = draw(
            st.sampled_from(
                [(1, []), (2, ["global", "personal"]), (2, ["global"]), (3, ["global"])]
            )
        )
        header["train"] = header["round"] < 3
    for key in draw(st.lists(st.sampled_from(sorted(header)), max_size=1)):
        odd = st.sampled_from([*_TEXTS, *_NUMBERS, None, [], {}, ["base", "global"], "r", "north"])
        if key != "recipe" and draw(st.booleans()):
            header[key] = draw(odd)
    return header


@st.composite
def tasks(draw: st.DrawFn) -> bytes:
    """Return a round's task as it should be, or cut, or changed in a bit, or none."""
    whole = task_of(asked_recipe(), draw(st.sampled_from([1, 1, 1, 2])))
    kind = draw(st.sampled_from([*["whole"] * 4, "cut", "changed", "none"]))
    if kind == "none":
        return b""
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    own = bytearray(whole)
    if kind == "changed":
        own[draw(st.integers(0, 3000)) % len(own)] ^= 1 << draw(st.integers(0, 7))
    return bytes(own)


def look_at(reply: Mapping[str, Any], body: bytes) -> None:
    """Demand that nothing private is in a reply."""
    text = json.dumps(reply)
    assert CANARY not in text
    assert CANARY.encode() not in body
    assert "/" not in text.replace("base/", "").replace("global/", "").replace("personal/", "")
    assert "700000" not in text
    if "refused" in reply:
        assert reply.keys() == {"refused", "option", "site"}
        assert Code(reply["refused"])
        assert reply["option"] in (*_KEYS, "clients", "", *_FLAGS)
        assert body == b""
    elif "error" in reply:
        assert reply.keys() == {"error"}
        assert Code(reply["error"])
    else:
        assert reply.keys() <= _ANSWERS
        assert reply.get("num_examples", ROWS) >= 20
        for value in reply.get("evaluation", {}).values():
            assert value == round(value, 4)


_FLAGS = ("--model", "--peers", "--trees-per-round", "--runs-per-day", "--requests-per-hour")
_ANSWERS = {
    *("site", "num_examples", "base_digest", "evaluation", "evaluation_seconds"),
    *("lacks_values", "changed"),
}


def check_any(worker: SiteWorker, header: dict[str, Any], body: bytes) -> str:
    """Ask, look at what is answered, and return what kind of answer it is."""
    if header["kind"] == "round":
        look_at(*worker.handle({**join(asked_recipe()), **_only(header, "run", "recipe")}, b""))
    reply, content = worker.handle(header, body)
    look_at(reply, content)
    if "evaluation" in reply or content:
        session = worker._sessions.last()
        assert session
        assert min(len(session.client.test), len(session.client.train)) >= 20
    return str(reply.get("refused") or reply.get("error") or ("update" if content else "answer"))


def _only(header: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: header[key] for key in keys}


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> SiteWorker:
    folder = tmp_path_factory.mktemp("joined")
    often = dict.fromkeys(("runs_per_day", "trees_per_round", "requests_per_hour"), 10**6)
    worker = make_worker(folder, write_rows(folder), **often)
    worker.handle(join(asked_recipe()), b"")
    return worker


@pytest.fixture(scope="module")
def shares_the_base() -> Iterator[None]:
    """Let all cases share what does not depend on them: the checked base, tokens of a row."""
    encode, known = encoding.encode, {}

    def encode_once(example: Example, wording: Wording, *, max_tokens: int) -> Encoded:
        key = repr(example), wording.template, wording.special, wording.learn, max_tokens
        if key not in known:
            known[key] = encode(example, wording, max_tokens=max_tokens)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "encode", encode_once)
        for name in ("check_checkpoint", "load_tokenizer"):
            patch.setattr(preparation, name, cache(getattr(preparation, name)))
        yield


_ANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.usefixtures("shares_the_base")
@settings(max_examples=20, derandomize=True, **_ANY)  # type: ignore[arg-type]
@given(header=requests(), body=tasks())
def test_whatever_is_asked_nothing_private_is_answered(
    joined: SiteWorker, caplog: pytest.LogCaptureFixture, header: dict[str, Any], body: bytes
) -> None:
    caplog.clear()
    check_any(joined, header, body)
    assert all(len(line) < 1200 and line.isprintable() for line in caplog.messages)
    audit = joined._audit.path.read_text()
    assert '"event": "failed"' not in audit, audit  # what is asked is refused, and breaks nothing


@pytest.mark.long
@pytest.mark.usefixtures("shares_the_base")
@settings(max_examples=150, **_ANY)  # type: ignore[arg-type]
@given(header=requests(), body=tasks())
def test_whatever_is_asked_at_length(
    joined: SiteWorker, header: dict[str, Any], body: bytes
) -> None:
    check_any(joined, header, body)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("shares_the_base")
@settings(max_examples=2000, **_ANY)  # type: ignore[arg-type]
@given(header=requests(), body=tasks())
def test_whatever_is_asked_for_minutes(
    joined: SiteWorker, header: dict[str, Any], body: bytes
) -> None:
    check_any(joined, header, body)


@pytest.mark.long
@pytest.mark.usefixtures("shares_the_base")
@settings(max_examples=15, **_ANY)  # type: ignore[arg-type]
@given(header=requests())
def test_whatever_is_asked_first(header: dict[str, Any]) -> None:
    with TemporaryDirectory() as name:
        check_any(make_worker(Path(name), write_rows(Path(name))), header, b"")
