"""Who holds which examples, and one test set for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federations import RECIPES
from orchard.data.examples import Example
from orchard.data.partition import DuplicateReport
from orchard.evaluation.quality import TestExample
from orchard.experiment.holdings import Federation, build_federation, build_site, data_digest
from orchard.experiment.preparation import prepare_experiment
from orchard.recipe.options import Recipe
from orchard.recipe.reading import read_recipe
from sites import site_recipe, write_sites

TOPICS = ("World", "Sports", "Business", "Sci/Tech")


def recipe_for(path: Path, *overrides: str) -> Recipe:
    options = ("model.path=orchard:tiny", f"data.path={path}", "data.test_per_category=3")
    return read_recipe(RECIPES / "ag_news" / "fedavg.toml", [*options, *overrides]).recipe


@pytest.fixture
def news(tmp_path: Path) -> Path:
    path = tmp_path / "news.jsonl"
    rows = [{"text": f"word {n} fig", "label": TOPICS[n % 4]} for n in range(80)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_a_central_test_set_is_one_list(news: Path) -> None:
    federation = build_federation(recipe_for(news))
    assert federation.has_central_test
    first, *others = federation.test.values()
    assert len(first) == 12
    assert all(test is first for test in others)
    held_out = {example.context for example in first}
    trained = [example for examples in federation.train.values() for example in examples]
    assert len(trained) == 68
    assert not held_out & {example.context for example in trained}


def test_a_sample_of_a_central_test_set_is_one_list_too(news: Path) -> None:
    federation = build_federation(recipe_for(news, "evaluation.max_examples=5"))
    first, *others = federation.test.values()
    assert len(first) == 5
    assert all(test is first for test in others)


def test_without_categories_a_central_test_set_is_so_many_examples(news: Path) -> None:
    overrides = ("data.partition=iid", "data.category=", "data.test_per_category=7")
    federation = build_federation(recipe_for(news, *overrides))
    assert [len(test) for test in federation.test.values()] == [7, 7, 7, 7]


def test_a_leak_into_a_central_test_set_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "news.jsonl"
    # Every text stands twice, so each of the 3 test examples of a label has its twin in training
    # or in the test set.
    rows = [{"text": f"word {n // 2}", "label": TOPICS[n // 2 % 4]} for n in range(160)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    federation = build_federation(recipe_for(path, "data.duplicates=report"))
    assert 0 < federation.duplicates.num_across_splits <= 12


def test_clients_share_the_encoded_central_test_set(news: Path) -> None:
    experiment = prepare_experiment(recipe_for(news))
    first, *others = experiment.test.values()
    assert all(test is first for test in others)
    for example, encoded in zip(experiment.federation.test["client_00"], first, strict=True):
        assert isinstance(encoded, TestExample)
        assert len(encoded.options) == 4
        assert encoded.options[encoded.answer] == encoded.encoded
        assert encoded.reference == example.response == TOPICS[encoded.answer]


def test_clients_with_test_sets_of_their_own_do_not_share(news: Path) -> None:
    federation = build_federation(
        recipe_for(news, "data.test_per_category=0", "data.test_size=0.2")
    )
    assert not federation.has_central_test
    assert len({id(test) for test in federation.test.values()}) == 4


def test_accuracy_needs_options_in_what_must_be_retained_too(news: Path) -> None:
    recipe = recipe_for(news, "evaluation.retention_path=orchard:facts")
    with pytest.raises(ValueError, match=r"the examples of evaluation\.retention_path must all"):
        prepare_experiment(recipe)


def test_accuracy_needs_labels_or_options_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.labels or data\.options must be given with acc"):
        recipe_for(tmp_path / "none.jsonl", "data.labels=")


def test_generated_answers_can_be_measured_on_options(news: Path) -> None:
    assert prepare_experiment(recipe_for(news, "evaluation.metrics=rouge_l"))


A, B = Example("a", "b"), Example("c", "d", "e", "f", ("d", "g"))


def federated(**held: tuple[list[Example], list[Example]]) -> Federation:
    train = {client: own for client, (own, _) in held.items()}
    test = {client: own for client, (_, own) in held.items()}
    return Federation(train, test, DuplicateReport(0, 0), 0)


def test_the_digest_of_equal_data_is_equal() -> None:
    one, other = (data_digest(federated(x=([A, B], [A]), y=([B], [A]))) for _ in range(2))
    assert one == other
    twin = Example("c", "d", "e", "f", ("d", "g"))
    assert data_digest(federated(x=([A, twin], [A]), y=([twin], [A]))) == one


@pytest.mark.parametrize(
    "other",
    [
        Example("A", "d", "e", "f", ("d", "g")),
        Example("c", "g", "e", "f", ("d", "g")),
        Example("c", "d", "", "f", ("d", "g")),
        Example("c", "d", "e", "", ("d", "g")),
        Example("c", "d", "e", "f", ("g", "d")),
        # The same letters, divided otherwise over the fields.
        Example("c", "de", "", "f", ("d", "g")),
    ],
)
def test_every_field_of_an_example_counts_for_its_client_alone(other: Example) -> None:
    before = data_digest(federated(x=([A, B], [A]), y=([B], [A])))
    after = data_digest(federated(x=([A, other], [A]), y=([B], [A])))
    assert after.overall != before.overall
    assert after.clients["x"] != before.clients["x"]
    assert after.clients["y"] == before.clients["y"]


def test_order_splits_clients_and_what_all_hold_count() -> None:
    whole = federated(x=([A, B], [A]), y=([B], [A]))
    digests = [
        data_digest(whole),
        data_digest(federated(x=([B, A], [A]), y=([B], [A]))),
        data_digest(federated(x=([A], [B, A]), y=([B], [A]))),
        data_digest(federated(y=([B], [A]), x=([A, B], [A]))),
        data_digest(federated(x=([A, B], [A]), z=([B], [A]))),
        data_digest(whole, retention=[A]),
        data_digest(whole, calibration=[A]),
    ]
    assert len({found.overall for found in digests}) == len(digests)


def test_a_site_has_the_digest_that_the_simulator_gives_its_client(tmp_path: Path) -> None:
    folder = write_sites(tmp_path / "sites")
    whole = data_digest(build_federation(site_recipe("fedavg", folder)))
    assert len(set(whole.clients.values())) == 2
    for site, digest in whole.clients.items():
        alone = build_site(site_recipe("fedavg", folder / f"{site}.jsonl"), site)
        assert data_digest(alone).clients == {site: digest}
