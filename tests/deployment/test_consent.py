from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchard.communication.audit import read_audit
from orchard.deployment.consent import Consent, Refusal
from orchard.deployment.site import SiteOptions, check_site
from orchard.deployment.site_recipe import own_recipe
from orchard.deployment.site_worker import SiteWorker
from orchard.experiment.own_methods import own_digests
from orchard.recipe.options import Recipe
from orchard.recipe.reading import parse_recipe, to_toml
from own_module import PULLED, offer, written
from sites import make_workers, site_recipe, write_sites


def recipe(method: str = "flex", **data: Any) -> Recipe:
    own = site_recipe(method, Path("elsewhere"))
    return replace(own, data=replace(own.data, **data))


def test_no_path_of_the_coordinator_is_opened() -> None:
    asked = recipe()
    asked = replace(
        asked,
        model=replace(asked.model, path="/models/theirs"),
        evaluation=replace(asked.evaluation, retention_path="/etc/theirs"),
        strategy=replace(asked.strategy, calibration_path="/etc/theirs"),
    )
    own = Consent("own.jsonl", model="own", retention="kept.jsonl", calibration="corpus.jsonl")
    applied = own_recipe(own, asked)
    assert "theirs" not in to_toml(applied)
    assert applied.data.path == "own.jsonl"
    for lacking in (
        replace(own, model=""),
        replace(own, retention=""),
        replace(own, calibration=""),
    ):
        with pytest.raises(Refusal, match="this site"):
            own_recipe(lacking, asked)


def test_a_recipe_from_the_network_names_no_file_to_read() -> None:
    with pytest.raises(ValueError, match="must be whole"):
        parse_recipe('extends = "/etc/secret.toml"')
    with pytest.raises(ValueError, match="must be TOML"):
        parse_recipe("not [ toml")
    asked = recipe("hfedmoe")
    assert parse_recipe(to_toml(asked)) == asked


def test_the_owner_chooses_methods_and_budgets() -> None:
    tiny = Consent("own.jsonl", model="orchard:tiny")
    consent = replace(tiny, methods=("hfedmoe",), budget="25%")
    assert own_recipe(consent, recipe("hfedmoe")).client.budget == "25%"
    with pytest.raises(Refusal, match="must be of hfedmoe"):
        own_recipe(consent, recipe("flex"))
    with pytest.raises(Refusal, match="trains all"):
        own_recipe(replace(tiny, budget="25%"), recipe("flex"))
    with pytest.raises(Refusal, match="at most 1MB at this site"):
        own_recipe(replace(tiny, memory="1MB"), recipe("flex"))
    assert own_recipe(replace(tiny, memory="64GB"), recipe("flex")).client.memory_bytes == ""
    assert own_recipe(replace(tiny, memory="64GB"), recipe("hfedmoe")).client.memory_bytes == "64GB"


@pytest.fixture
def worker(tmp_path: Path) -> SiteWorker:
    data = write_sites(tmp_path / "data", num_sites=1)
    (worker,) = make_workers(
        data, tmp_path / "stores", consent=lambda own: replace(own, methods=("flex",))
    ).values()
    return worker


def join(asked: Recipe) -> dict[str, Any]:
    return {"kind": "join", "run": "r", "recipe": to_toml(asked)}


def test_a_site_joins_or_says_why_not_and_writes_it_down(
    worker: SiteWorker, tmp_path: Path
) -> None:
    header, _ = worker.handle(join(recipe()), b"")
    assert header["num_examples"] == 18
    header, _ = worker.handle(join(recipe("fedavg")), b"")
    assert "must be of flex" in header["refused"]
    header, _ = worker.handle(join(recipe(test_size=500.0)), b"")
    assert "must fit this site" in header["refused"]
    header, _ = worker.handle({"kind": "format", "run": "r"}, b"")
    assert "kind must be" in header["refused"]
    (store,) = (tmp_path / "stores").iterdir()
    events = [event["event"] for event in read_audit(store / "audit.jsonl")]
    assert events == ["joined", "refused", "refused", "refused"]


def test_a_task_for_another_site_is_refused(worker: SiteWorker) -> None:
    header = {
        **join(recipe()),
        "kind": "round",
        "round": 1,
        "site": "elsewhere",
        "index": 0,
        "num_clients": 1,
        "evaluate": [],
        "train": True,
    }
    reply, body = worker.handle(json.loads(json.dumps(header)), b"")
    assert "site must be" in reply["refused"]
    assert body == b""


@pytest.mark.parametrize("allowed", [(), ("flex", "fedavg", "mine:pulled")])
@pytest.mark.parametrize(
    "asked",
    [
        "theirs:run",
        "flex+theirs:run",
        "mine:pulled+theirs:run",
        "theirs:other",
        "mine:pulled + theirs :run",
        "theirs",
        "offered",
        "mine.theirs:run",
    ],
)
def test_nothing_is_imported_that_the_owner_did_not_name(
    asked: str, allowed: tuple[str, ...], tmp_path: Path
) -> None:
    trace = tmp_path / "was_imported"
    theirs = f"open({str(trace)!r}, 'w').close()\ndef run(strategy):\n    return strategy\n"
    (worker,) = make_workers(
        write_sites(tmp_path / "data", num_sites=1),
        tmp_path / "stores",
        consent=lambda own: replace(own, methods=allowed),
    ).values()
    whole = recipe()
    text = to_toml(replace(whole, strategy=replace(whole.strategy, name=asked)))
    with written(tmp_path / "installed", theirs=theirs, mine=PULLED):
        offer(tmp_path / "installed", offered="theirs:run")
        for kind in ("join", "round"):
            header = {"kind": kind, "run": "r", "recipe": text, "methods": {asked: ""}}
            header |= {"round": 1, "site": "harbor", "index": 0, "num_clients": 1}
            reply, _ = worker.handle({**header, "evaluate": [], "train": True}, b"")
            assert "its owner names others with --methods" in reply["refused"]
        assert not trace.exists()
        assert not {"theirs", "mine"} & sys.modules.keys()


def test_a_site_runs_an_own_method_that_its_owner_named_from_the_same_source(
    tmp_path: Path,
) -> None:
    (worker,) = make_workers(
        write_sites(tmp_path / "data", num_sites=1),
        tmp_path / "stores",
        consent=lambda own: replace(own, methods=("fedavg", "mine:pulled")),
    ).values()
    with written(tmp_path / "installed", mine=PULLED):
        asked = join(recipe("fedavg+mine:pulled"))
        for theirs in ({}, {"methods": {"mine:pulled": "0" * 64}}):
            reply, _ = worker.handle({**asked, **theirs}, b"")
            assert "mine:pulled must have the coordinator's source" in reply["refused"]
        reply, _ = worker.handle({**asked, "methods": own_digests(["mine:pulled"])}, b"")
        assert reply["num_examples"] == 18


def test_an_owner_is_told_at_once_of_a_method_that_is_not_there(tmp_path: Path) -> None:
    data = write_sites(tmp_path / "data", num_sites=1) / "harbor.jsonl"
    consent = Consent(str(data), methods=("fedavg", "nowhere_to_be_found:x"))
    options = SiteOptions("harbor", "127.0.0.1:1", tmp_path / "store", consent)
    with pytest.raises(ValueError, match="a module that can be found"):
        check_site(options)
    with pytest.raises(ValueError, match="got flx"):
        check_site(replace(options, consent=replace(consent, methods=("flx",))))
    check_site(replace(options, consent=replace(consent, methods=("fedavg",))))
