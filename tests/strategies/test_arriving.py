"""Clients that arrive after training move nothing that is shared, and train what they keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from federations import quick_recipe, run_quickly
from orchard.experiment.checking import check_between_sites
from orchard.experiment.methods import build_strategy
from orchard.results import MetricsLog

ARRIVING = ("data.arriving=1", "evaluation.models=global,personal", "evaluation.metrics=loss")
ROUNDS = "strategy.arrival_rounds=2"


def lines_of(folder: Path) -> list[tuple[int, str]]:
    return [
        (line["round"], line["client"])
        for line in MetricsLog(folder / "metrics.jsonl")
        if line["kind"] == "client"
    ]


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        ("flex", True),
        ("fedavg", False),
        pytest.param("orchard", True, marks=pytest.mark.long),
        pytest.param("ditto", True, marks=pytest.mark.long),
        pytest.param("local", True, marks=pytest.mark.long),
        pytest.param("finetune", True, marks=pytest.mark.long),
    ],
)
def test_a_client_that_arrives_moves_nothing_shared(
    method: str, trains: bool, tmp_path: Path
) -> None:
    own = ("strategy.finetune_rounds=1",) if method == "finetune" else ()
    cap = ("evaluation.max_examples=6", *own)
    recipe = quick_recipe(method, *ARRIVING, ROUNDS, *cap)
    result = run_quickly(tmp_path / "arrived", recipe)
    (last,) = result["arriving"]
    assert result["num_rounds"] == 4
    assert {client for number, client in lines_of(tmp_path / "arrived") if number > 2} == {last}
    assert all(client != last for number, client in lines_of(tmp_path / "arrived") if number <= 2)
    personal = result["metrics"]["personal"]
    assert [*personal["arriving_loss"]] == [last]
    assert last not in personal["loss"]
    assert len(personal["loss"]) == 3
    assert result["summary"]["personal"]["arriving_loss"]["mean"] == personal["arriving_loss"][last]
    assert bool(result["parameters"]["private"][last]) == trains
    # Who was there before is as if nobody had come.
    fewer = run_quickly(
        tmp_path / "one", quick_recipe(method, *ARRIVING, "strategy.arrival_rounds=1", *cap)
    )
    assert fewer["shared_digest"] == result["shared_digest"]
    assert fewer["metrics"]["personal"]["loss"] == personal["loss"]
    if method != "local":
        same = result["metrics"]["global"]["arriving_loss"][last]
        assert (personal["arriving_loss"][last] != same) == trains


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("data.arriving=4",), r"data\.arriving must leave a cohort of 1 of 4 clients, got 4"),
        (("strategy.name=hfedmoe",), r"data\.arriving must be 0 with hfedmoe"),
        (("strategy.name=scaffold",), r"data\.arriving must be 0 with scaffold"),
        (("privacy.secure_aggregation=true",), r"data\.arriving must be 0 with an option of priv"),
    ],
)
def test_what_is_not_known_for_who_arrives_is_refused(
    options: tuple[str, ...], message: str
) -> None:
    recipe = quick_recipe("fedavg", "data.arriving=1", *options)
    with pytest.raises(ValueError, match=message):
        build_strategy(recipe, num_clients=4)


def test_sites_do_not_arrive_and_rounds_of_arrival_need_someone() -> None:
    with pytest.raises(ValueError, match=r"data\.arriving must be 0 between sites"):
        check_between_sites(quick_recipe("fedavg", "data.arriving=1"))
    with pytest.raises(ValueError, match=r"strategy\.arrival_rounds must come with data\.arriving"):
        quick_recipe("fedavg", ROUNDS)
