"""Who holds which examples, and one test set for all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federations import RECIPES
from orchard.data.examples import Example
from orchard.data.partition import DuplicateReport
from orchard.evaluation.quality import TestExample
from orchard.experiment.checking import check_between_sites
from orchard.experiment.data_record import data_digest
from orchard.experiment.holdings import Federation, build_federation, build_site
from orchard.experiment.planning import make_plan
from orchard.experiment.preparation import data_notes, prepare_experiment
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


# What is said of the data, and who is left out


def own_recipe(path: Path, *overrides: str) -> Recipe:
    options = ("model.path=orchard:tiny", f"data.path={path}", "data.duplicates=report")
    return read_recipe(RECIPES / "own" / "flex.toml", [*options, *overrides]).recipe


def write_boxes(path: Path, number: int, *, categories: tuple[str | None, ...] = (None,)) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = []
    for n in range(number):
        row = {"instruction": f"What is in box {n} of {path.stem}?", "response": f"{n} keys"}
        category = categories[n % len(categories)]
        lines.append(json.dumps(row | ({} if category is None else {"category": category})))
    path.write_text("\n".join(lines) + "\n")


def num_held(federation: Federation) -> int:
    parts = (federation.train, federation.test)
    return sum(len(examples) for part in parts for examples in part.values())


@pytest.mark.parametrize("options", [(), ("data.categories=even,odd",)], ids=["all", "named"])
def test_examples_without_a_category_are_counted_and_said(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    write_boxes(tmp_path / "boxes.jsonl", 40, categories=("even", "odd", None, " "))
    federation = build_federation(own_recipe(tmp_path / "boxes.jsonl", *options))
    assert list(federation.train) == ["even", "odd"]
    assert num_held(federation) == 20
    assert any(note.startswith("20 of 40 examples have no category") for note in federation.notes())


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("data.categories=a,b", "data.partition=dirichlet"),
        ("data.partition=dirichlet",),
        ("data.partition=dirichlet_resample", "data.test_per_category=3"),
    ],
)
def test_data_without_categories_says_so_and_names_what_fits(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    write_boxes(tmp_path / "boxes.jsonl", 40)
    with pytest.raises(
        ValueError, match=r"none of 40 has one in .*'category'.*partition=iid.*file"
    ):
        build_federation(own_recipe(tmp_path / "boxes.jsonl", *options))


def test_what_a_skew_of_labels_does_with_examples_without_one_is_said(tmp_path: Path) -> None:
    write_boxes(tmp_path / "boxes.jsonl", 80, categories=("even", "odd", None, "even"))
    options = ("data.partition=dirichlet", "data.num_clients=2", "data.alpha=100")
    federation = build_federation(own_recipe(tmp_path / "boxes.jsonl", *options))
    assert num_held(federation) == 80
    assert federation.notes() == [
        "20 of 80 examples have no category (data.category = category) and are divided as if they "
        "were of one"
    ]


@pytest.mark.parametrize(
    ("partition", "unread"),
    [
        ("iid", ["notes.txt", "west.csv"]),
        ("category", ["notes.txt", "west.csv"]),
        ("file", ["notes.txt", "old/"]),
    ],
)
def test_files_of_a_folder_that_are_not_read_are_named(
    tmp_path: Path, partition: str, unread: list[str]
) -> None:
    folder = tmp_path / "clients"
    write_boxes(folder / "north.json", 20, categories=("even",))
    write_boxes(folder / "south.json", 20, categories=("even",))
    write_boxes(folder / "old" / "north.json", 20, categories=("even",))
    (folder / "west.csv").write_text(
        "instruction,response,category\n" + "".join(f"What {n}?,{n},odd\n" for n in range(20))
    )
    (folder / "notes.txt").write_text("Ours.")
    federation = build_federation(own_recipe(folder, f"data.partition={partition}"))
    (note,) = (note for note in federation.notes() if note.startswith("files"))
    listed = ", ".join(map(repr, unread))
    assert note == f"files of data.path that are not read ({len(unread)}): {listed}"


def test_a_path_of_another_partition_names_the_one_that_fits(tmp_path: Path) -> None:
    write_boxes(tmp_path / "clients" / "north.jsonl", 20)
    with pytest.raises(ValueError, match=r"folder of clients .*data\.partition=file"):
        build_federation(own_recipe(tmp_path / "clients"))
    file = tmp_path / "clients" / "north.jsonl"
    with pytest.raises(ValueError, match=r"got the file .*data\.partition=iid .* or category"):
        build_federation(own_recipe(file, "data.partition=file"))


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        ("norht.jsonl", ("data.partition=file",), r"data\.path must be a folder with one file"),
        ("north", ("data.partition=file",), r"data\.path must be a folder .* is not there"),
        ("norht.jsonl", (), r"path must be an existing file, got"),
        (
            "north.jsonl",
            (
                "data.partition=iid",
                "data.num_clients=2",
                "evaluation.retention_path={}/norht.jsonl",
            ),
            r"evaluation\.retention_path must be a file with examples",
        ),
    ],
)
def test_a_path_that_is_not_there_says_what_is_spelled_alike(
    path: str, overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    write_boxes(tmp_path / "north.jsonl", 20)
    recipe = own_recipe(tmp_path / path, *(each.format(tmp_path) for each in overrides))
    with pytest.raises(
        FileNotFoundError, match=f"^{message}.* holds north.jsonl\\); check the spel"
    ):
        make_plan(recipe)


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    """Return a folder of two large clients and one of three rows, and a file that is no data."""
    for client, number in (("large", 24), ("other", 24), ("three_rows", 3)):
        write_boxes(tmp_path / "clients" / f"{client}.jsonl", number)
    (tmp_path / "clients" / "LICENSE").write_text("Ours.")
    return tmp_path / "clients"


def test_a_client_that_is_too_small_is_left_out_and_named(unequal: Path) -> None:
    federation = build_federation(own_recipe(unequal, "data.partition=file"))
    assert list(federation.train) == ["large", "other"]
    assert num_held(federation) == 48
    assert federation.notes() == [
        "files of data.path that are not read (1): 'LICENSE'",
        "1 of 3 clients hold fewer than 6 examples (data.min_examples) and are left out: "
        "'three_rows' (3)",
    ]


def test_a_client_that_is_too_small_is_an_error_that_says_how_to_leave_it_out(
    unequal: Path,
) -> None:
    options = ("data.partition=file", "data.min_examples=0")
    with pytest.raises(ValueError, match=r"'three_rows' .* \(data\.min_examples=6\)"):
        build_federation(own_recipe(unequal, *options))
    options = ("data.partition=file", "data.min_examples=4")
    assert list(build_federation(own_recipe(unequal, *options)).train) == ["large", "other"]


def test_a_category_that_is_too_small_is_left_out_too(tmp_path: Path) -> None:
    write_boxes(tmp_path / "boxes.jsonl", 40, categories=(*["most"] * 19, "rare"))
    federation = build_federation(own_recipe(tmp_path / "boxes.jsonl"))
    assert list(federation.train) == ["most"]
    assert any("left out: 'rare' (2)" in note for note in federation.notes())


def test_a_client_must_be_left(unequal: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.min_examples must leave a client in, got 50"):
        build_federation(own_recipe(unequal, "data.partition=file", "data.min_examples=50"))


def test_a_site_that_is_too_small_takes_no_part(unequal: Path) -> None:
    recipe = own_recipe(unequal / "three_rows.jsonl", "data.partition=file")
    with pytest.raises(ValueError, match=r"'three_rows' must hold at least 6 examples .* got 3"):
        build_site(recipe, "three_rows")


def test_what_is_not_read_is_said_of_everything_that_a_run_reads(tmp_path: Path) -> None:
    for name in ("own", "known"):
        rows = [
            {"instruction": f"{name} {n}", "input": f"x{n}", "output": f"{n}", name: n or None}
            for n in range(20)
        ]
        rows.append({"instruction": "bad"})
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    options = ("data.partition=iid", "data.num_clients=2", "data.bad_rows=skip")
    known = f"evaluation.retention_path={tmp_path / 'known.jsonl'}"
    recipe = own_recipe(tmp_path / "own.jsonl", *options, known)
    notes = data_notes(prepare_experiment(recipe))
    assert list(make_plan(recipe).notes) == notes
    for option, column in (("data.path", "own"), ("evaluation.retention_path", "known")):
        taken, unread, bad = (note for note in notes if option in note)
        assert f"{option} is read as alpaca" in taken
        assert unread == f"columns of {option} that are not read: '{column}' (19 rows)"
        assert bad.startswith(f"1 of 21 rows of {option} are bad and left out: line 21 of ")
    assert len(notes) == 6


def test_each_client_names_the_labels_its_own_way_and_is_told(news: Path) -> None:
    plain, own = (
        build_federation(recipe_for(news, "data.partition=iid", f"data.conventions={way}"))
        for way in ("", "label_names")
    )
    assert not own.has_central_test
    for place, client in enumerate(plain.train):
        for before, after in (
            (plain.train[client], own.train[client]),
            (plain.test[client], own.test[client]),
        ):
            assert [e.context for e in after] == [e.context for e in before]
            assert [e.category for e in after] == [e.category for e in before]
            shifted = [TOPICS[(TOPICS.index(e.response) + place) % 4] for e in before]
            assert [e.response for e in after] == shifted
    (note,) = [note for note in own.notes() if note.startswith("'client_01'")]
    assert note.endswith(
        "(data.conventions = label_names): World -> Sports, Sports -> Business, "
        "Business -> Sci/Tech, Sci/Tech -> World"
    )
    before, after = data_digest(plain), data_digest(own)
    assert [before.own[c] == after.own[c] for c in plain.train] == [True, False, False, False]
    assert before.test != after.test


def test_conventions_fit_the_kind_of_data(news: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.conventions must be label_names with data\.lab"):
        recipe_for(news, "data.conventions=answer_form")
    with pytest.raises(ValueError, match=r"data\.labels must be given, and data\.letters be false"):
        recipe_for(news, "data.conventions=label_names", "data.letters=true")
    recipe = recipe_for(news, "data.conventions=label_names")
    with pytest.raises(ValueError, match=r"data\.conventions must be empty between sites"):
        build_site(recipe, "a")
    with pytest.raises(ValueError, match=r"data\.conventions must be empty between sites"):
        check_between_sites(recipe)


def test_several_files_are_a_client_each_in_their_order(tmp_path: Path) -> None:
    for name, size in (("b", 8), ("a", 6)):
        rows = [{"instruction": f"{name} {n}", "response": "yes"} for n in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ("data.partition=file", "data.test_size=2")
    path = f"two={tmp_path}/b.jsonl, one={tmp_path}/a.jsonl"
    federation = build_federation(
        read_recipe(RECIPES / "own" / "flex.toml", [f"data.path={path}", *options]).recipe
    )
    assert {c: len(own) for c, own in federation.train.items()} == {"two": 6, "one": 4}
    for wrong, got in (
        (f"{path},two={tmp_path}/a.jsonl", "'two' twice"),
        (f"{path},three", "'three'"),
        (f"{path},three=", "'three='"),
    ):
        recipe = read_recipe(RECIPES / "own" / "flex.toml", [f"data.path={wrong}", *options])
        with pytest.raises(ValueError, match=rf"data\.path must name each client once.*got {got}"):
            build_federation(recipe.recipe)
    recipe = read_recipe(RECIPES / "own" / "flex.toml", ["data.path=x=none.jsonl", *options])
    with pytest.raises(FileNotFoundError, match=r"data\.path must be a file with examples"):
        build_federation(recipe.recipe)


def test_clients_are_measured_on_rows_of_all_others_and_none_of_their_own(news: Path) -> None:
    own = ("data.test_per_category=0", "data.partition=iid", "data.test_size=5")
    experiment = prepare_experiment(recipe_for(news, *own, "evaluation.other_clients=9"))
    drawn = []
    for client, others in experiment.others.items():
        assert len(others) == 9
        elsewhere = [e for c, test in experiment.test.items() if c != client for e in test]
        assert all(any(e is other for e in elsewhere) for other in others)
        drawn.append({elsewhere.index(e) for e in others})
    assert len({tuple(sorted(own)) for own in drawn}) > 1
    every = prepare_experiment(recipe_for(news, *own, "evaluation.other_clients=99"))
    assert {len(others) for others in every.others.values()} == {15}
    assert prepare_experiment(recipe_for(news, *own)).others == {}
    with pytest.raises(ValueError, match=r"evaluation\.other_clients must be 0 with data"):
        recipe_for(news, "evaluation.other_clients=9")
    with pytest.raises(ValueError, match=r"evaluation\.other_clients must be 0 with one client"):
        prepare_experiment(
            recipe_for(news, *own, "evaluation.other_clients=9", "data.num_clients=1")
        )
    with pytest.raises(ValueError, match=r"evaluation\.other_clients must be 0 between sites"):
        check_between_sites(recipe_for(news, *own, "evaluation.other_clients=9"))


def test_a_corpus_of_plain_texts_chooses_experts(news: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"text": "word fig " * 40}, {"text": " "}, {"text": "fig"}]
    corpus.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ("strategy.name=flex", "strategy.calibration=corpus", "model.lora_targets=attention")
    path = f"strategy.calibration_path={corpus}"
    experiment = prepare_experiment(recipe_for(news, *options, path, "data.max_tokens=32"))
    first, second = experiment.calibration
    assert len(first.input_ids) == 32
    assert first.is_truncated
    assert not second.is_truncated
    tokenizer = experiment.tokenizer
    assert tokenizer.decode(second.input_ids, skip_special_tokens=True).strip() == "fig"
    # Rows of the data's own form are read as examples.
    own = prepare_experiment(recipe_for(news, *options, f"strategy.calibration_path={news}"))
    assert len(own.calibration) == 80


def test_a_fresh_graft_is_refused_what_an_expert_is_needed_for(news: Path) -> None:
    fresh = ("strategy.name=flex", "strategy.graft_choice=fresh")
    dense = (*fresh, "strategy.graft_kind=dense", "strategy.graft_gate=closed")
    assert recipe_for(news, *dense).strategy.graft_choice == "fresh"
    for options, key in (
        (fresh, "kind must be dense"),
        ((*fresh, "strategy.graft_kind=dense"), "gate must be closed or none"),
        ((*dense, "strategy.graft_mix=difference"), "mix must be additive or convex"),
        ((*dense, "strategy.graft_experts=2"), "experts must be 1"),
    ):
        with pytest.raises(ValueError, match=rf"strategy\.graft_{key} with strategy\.graft_choice"):
            recipe_for(news, *options)
