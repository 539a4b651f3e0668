from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from federations import short_model
from orchard.communication.audit import read_audit
from orchard.deployment.consent import Consent, Refusal
from orchard.deployment.limits import CLIENTS, LIMITS, parse_limits
from orchard.deployment.site import SiteOptions, check_site
from orchard.deployment.site_recipe import own_recipe as own_recipe_by
from orchard.deployment.site_worker import SiteWorker
from orchard.deployment.terms import terms_of
from orchard.experiment.own_methods import own_digests
from orchard.recipe.options import Recipe
from orchard.recipe.reading import known_options, option_value, parse_recipe, to_toml
from orchard.strategies.session import RANKS
from own_module import PULLED, offer, written
from sites import changed, make_workers, site_recipe, write_sites


def own_recipe(consent: Consent, asked: Recipe, *, num_clients: int = 1) -> Recipe:
    return own_recipe_by(consent, asked, terms_of(asked), num_clients=num_clients)


def recipe(method: str = "flex", **data: Any) -> Recipe:
    own = site_recipe(method, Path("elsewhere"))
    return replace(own, data=replace(own.data, **data))


def test_no_path_of_the_coordinator_is_opened() -> None:
    asked = recipe()
    asked = replace(
        asked,
        model=replace(asked.model, path="/models/theirs"),
        evaluation=replace(
            asked.evaluation, retention_path="/etc/theirs", shots_path="/etc/theirs"
        ),
        strategy=replace(asked.strategy, calibration_path="/etc/theirs"),
        server=replace(asked.server, start="/etc/theirs"),
    )
    asked = replace(asked, model=replace(asked.model, expert_cache="/etc/theirs"))
    asked = replace(asked, data=replace(asked.data, path="/etc/theirs"))
    # Whatever option comes to name a path is asked for here too.
    paths = [key for key in known_options() if key.endswith(("path", "start", "cache"))]
    assert all("theirs" in str(option_value(asked, key)) for key in paths)
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


def with_selection(method: str, **selection: Any) -> Recipe:
    own = recipe(method)
    return replace(own, selection=replace(own.selection, **selection))


CHOOSERS = ("hfedmoe", "fedavg_random", "pflmoe", "fedmoe", "seermoe", "flex+hfedmoe")


@pytest.mark.parametrize("given", [{"budget": "8"}, {"memory": "1GB"}])
@pytest.mark.parametrize("method", CHOOSERS)
def test_no_option_trains_more_experts_than_the_owner_gives(
    method: str, given: dict[str, str]
) -> None:
    consent = Consent("own.jsonl", model=short_model(), **given)  # type: ignore[arg-type]
    for rank in RANKS:
        asked = with_selection(method, rank_by=rank)
        asked = replace(asked, client=replace(asked.client, budget="100%"))
        if rank == "none" and "hfedmoe" in method:
            with pytest.raises(Refusal, match="must choose experts") as caught:
                own_recipe(consent, asked)
            assert (caught.value.code, caught.value.option) == ("budget", "selection.rank_by")
            continue
        client = own_recipe(consent, asked).client
        assert (client.budget, client.memory_bytes) == (
            given.get("budget", ""),
            given.get("memory", ""),
        )


def test_of_a_budget_and_a_memory_the_smaller_holds() -> None:
    consent = Consent("own.jsonl", model=short_model(), budget="8", memory="64GB")
    assert own_recipe(consent, recipe("hfedmoe")).client.budget == "8"
    assert own_recipe(replace(consent, budget="100%"), recipe("hfedmoe")).client.budget == "16"
    with pytest.raises(Refusal, match="one expert in each"):
        own_recipe(replace(consent, memory="1MB"), recipe("hfedmoe"))


@pytest.mark.parametrize("key", sorted({*LIMITS} - {CLIENTS}))
def test_every_limit_of_the_owner_holds(key: str) -> None:
    kind, entry = known_options()[key]
    least = entry.metadata["minimum"] or 1
    asked = changed(recipe(), key, kind(least + 1))
    consent = Consent("own.jsonl", model="orchard:tiny", limits={key: least})
    with pytest.raises(Refusal, match=f"^{key} must be at most") as caught:
        own_recipe(consent, asked)
    assert (caught.value.code, caught.value.option) == ("limit", key)
    own_recipe(replace(consent, limits={key: least + 1}), asked)
    # Without a word of the owner's there is a limit too.
    with pytest.raises(Refusal, match=f"^{key} must be at most"):
        own_recipe(replace(consent, limits={}), changed(recipe(), key, kind(LIMITS[key] + 1)))


def test_a_federation_of_more_sites_than_the_owner_believes_is_refused() -> None:
    consent = Consent("own.jsonl", model="orchard:tiny", limits={CLIENTS: 3})
    own_recipe(consent, recipe(), num_clients=3)
    with pytest.raises(Refusal, match=r"^clients must be at most 3"):
        own_recipe(consent, recipe(), num_clients=4)


@pytest.mark.parametrize(("option", "value"), [("privacy.unit", "client")])
def test_a_site_takes_no_part_in_a_promise_that_nobody_keeps(option: str, value: object) -> None:
    consent = Consent("own.jsonl", model="orchard:tiny")
    with pytest.raises(Refusal, match=f"^{option} must not be .* between sites") as caught:
        own_recipe(consent, changed(recipe(), option, value))
    assert (caught.value.code, caught.value.option) == ("recipe", option)


def test_limits_are_read_from_the_command_line() -> None:
    assert parse_limits(["client.steps=100", "clients=5"]) == {"client.steps": 100, "clients": 5}
    for wrong in ("client.steps", "data.path=3", "steps=3", "client.steps=many", "client.lr=nan"):
        with pytest.raises(ValueError, match=r"^--limit must"):
            parse_limits([wrong])


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
    assert header == {"site": "harbor", "num_examples": 18}
    header, _ = worker.handle(join(recipe("fedavg")), b"")
    assert header == {"refused": "method", "option": "strategy.name", "site": "harbor"}
    header, _ = worker.handle({"kind": "format", "run": "r"}, b"")
    assert header == {"refused": "request", "option": "", "site": "harbor"}
    (store,) = (tmp_path / "stores").iterdir()
    events = read_audit(store / "audit.jsonl")
    assert [event["event"] for event in events] == ["joined", "refused", "refused"]
    assert "must be of flex at this site" in events[1]["reason"]  # the owner is told in words


def test_a_recipe_that_does_not_fit_the_data_is_refused_by_a_code(
    worker: SiteWorker, tmp_path: Path
) -> None:
    header, _ = worker.handle(join(recipe(test_size=500.0)), b"")
    assert header["refused"] == "data"
    (store,) = (tmp_path / "stores").iterdir()
    (event,) = read_audit(store / "audit.jsonl")
    assert "500" in event["reason"]


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
    assert reply["refused"] == "site"
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
        header: dict[str, Any] = {"run": "r", "recipe": text, "methods": {asked: "0"}}
        seat = {"round": 1, "site": "harbor", "index": 0, "num_clients": 1}
        for own in ({"kind": "join"}, {"kind": "round", **seat, "evaluate": [], "train": True}):
            reply, _ = worker.handle({**header, **own}, b"")
            assert reply["refused"] == "method"
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
            assert reply["refused"] == "method_source"
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
