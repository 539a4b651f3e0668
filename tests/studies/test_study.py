"""A study runs what is missing, uses what is there, and says what can be said."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import orchard.engine.simulator as simulator
from federations import short_model
from orchard.pages.writing import write_page
from orchard.studies.design import read_design
from orchard.studies.reporting import as_record, write_report
from orchard.studies.rows import Row, build_rows
from orchard.studies.running import Progress, check_study, run_study

STUDY = """
reference = "fedavg"
seeds = [0]

[set]
model.path = "{model}"
server.rounds = 2
client.steps = 1
data.max_train = 12
evaluation.metrics = "loss"
evaluation.max_examples = 12
evaluation.retention_path = ""

[[method]]
recipe = "tiny/fedavg"

"""
KEPT = """
[[method]]
name = "kept"
recipe = "tiny/fedavg"
set = {{ strategy.kept = "*.lora_A" }}
"""
TUNING = """
[tuning]
seeds = [7]
validation_size = 8
grid = {{ client.lr = [1e-9, 1e-2] }}
"""


def write(folder: Path, *, extra: str = "", without: str = "", every: int = 0) -> Path:
    path = folder / "study.toml"
    assert without in STUDY
    text = STUDY.replace(without, "").replace("[set]", f"[set]\nevaluation.every = {every}")
    path.write_text((text + extra).format(model=short_model()))
    return path


def run(path: Path, out: Path, *, jobs: int = 1) -> tuple[dict[str, Any], list[str]]:
    design, told = read_design(path), list[str]()
    check_study(design)
    latest: list[Progress] = []
    progress = run_study(design, out, jobs=jobs, tell=told.append, changed=latest.append)
    rows = write_report(design, progress, out)
    assert progress.num_done == progress.num_runs == len(told)
    return as_record(design, progress, rows), told


@pytest.mark.long
def test_interrupting_and_repeating_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, extra=KEPT)
    whole, told = run(path, tmp_path / "whole")
    assert not any("there" in line for line in told)
    save, calls = simulator.save_checkpoint, list[int]()

    def cut(*args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # in the second round of the second run
            raise KeyboardInterrupt
        save(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(simulator, "save_checkpoint", cut)
        with pytest.raises(KeyboardInterrupt):
            run(path, tmp_path / "cut")
    resumed, told = run(path, tmp_path / "cut")
    assert sum("there" in line for line in told) == 1
    assert resumed["digest"] == whole["digest"]
    page = (tmp_path / "cut" / "report.md").read_bytes()
    again, told = run(path, tmp_path / "cut")
    assert all(line.endswith("(there)") for line in told)
    assert again["digest"] == whole["digest"]
    assert (tmp_path / "cut" / "report.md").read_bytes() == page
    record = json.loads((tmp_path / "cut" / "study.json").read_text())
    assert record["digest"] == whole["digest"]
    assert {len(column["runs"]) for column in record["columns"]} == {1}


def rows_of(path: Path, out: Path) -> list[Row]:
    design = read_design(path)
    run(path, out)
    progress = run_study(design, out, tell=lambda text: None, changed=lambda progress: None)
    return build_rows(design, progress)


def test_a_report_says_what_runs_say(tmp_path: Path) -> None:
    others = "".join(
        f'\n[[method]]\nname = "{name}"\nrecipe = "tiny/{recipe}"\n'
        "set = {{ client.lr = 1e-12, client.lr_min = 0.0 }}\n"
        for name, recipe in (("same", "ditto"), ("still", "fedavg"))
    )
    path = write(tmp_path, extra=KEPT + others, every=1)
    fedavg, kept, ditto, other = rows_of(path, tmp_path / "out")
    assert [row.method for row in (fedavg, kept, ditto, other)] == [
        "fedavg",
        "kept",
        "same",
        "still",
    ]
    assert fedavg.verdict == "reference"
    assert kept.interval is not None
    assert kept.interval.mean == pytest.approx(kept.mean - fedavg.mean, abs=1e-6)
    # Neither of these moved: both are the base, and lose as much to the reference.
    assert ditto.mean == pytest.approx(other.mean, abs=1e-5)
    assert ditto.verdict.startswith("worse")
    assert kept.private == kept.shared == fedavg.shared / 2
    assert ditto.private == ditto.shared
    assert (fedavg.steps, ditto.steps) == (2, 4)
    assert kept.uplink_bytes < fedavg.uplink_bytes
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Nothing was tuned" in page
    csv = (tmp_path / "out" / "report.csv").read_text().splitlines()
    assert len(csv) == 1 + 4
    assert csv[2].split(",")[1] == "kept"
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["fedavg", "kept", "same", "still"]
    assert record["rows"][1]["difference"]["mean"] == kept.interval.mean
    assert fmean(record["rows"][1]["clients"].values()) == pytest.approx(kept.mean)
    assert 0 < fedavg.search_seconds < fedavg.seconds
    assert 0 < fedavg.row_seconds < 1
    curves = {curve["method"]: curve for curve in record["curves"]}
    assert curves["fedavg"]["values"]["2"] == pytest.approx(fedavg.mean)
    assert curves["fedavg"]["rounds"] == {"0": 2}
    assert curves["fedavg"]["times_as_fast"] == 1
    assert (curves["still"]["rounds"], curves["still"]["times_as_fast"]) == ({"0": None}, None)
    assert "| still | never |  |" in page
    write_page([tmp_path / "out"], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert all(f'data-value="{row.mean!r}"' in html for row in (fedavg, kept, ditto, other))


def test_tuning_chooses_on_rows_that_nobody_tests_and_records_its_grid(tmp_path: Path) -> None:
    path = write(tmp_path, extra=TUNING)
    record, told = run(path, tmp_path / "out")
    assert len(told) == 2 + 1
    assert all(column["options"] == {"client.lr": 0.01} for column in record["columns"])
    assert all(
        [own for own, _ in c["tried"]] == [{"client.lr": 1e-9}, {"client.lr": 0.01}]
        for c in record["columns"]
    )
    page = (tmp_path / "out" / "report.md").read_text()
    assert "The same 2 choices for every method, on 8 of each client's training rows" in page


@pytest.mark.long
def test_several_processes_make_the_same_study(tmp_path: Path) -> None:
    path = write(tmp_path, extra=KEPT)
    one, _ = run(path, tmp_path / "one")
    two, _ = run(path, tmp_path / "two", jobs=2)
    assert one["digest"] == two["digest"]


@pytest.mark.parametrize(
    ("extra", "without", "message"),
    [
        (
            "",
            'reference = "fedavg"\nseeds = [0]\n',
            "seeds must be a list of whole numbers, got none",
        ),
        ("", "seeds = [0]\n", "seeds must be a list of whole numbers"),
        ("[grid]\ndata.rows = [1]\n", "", "grid must have known options, got data.rows"),
        (
            "[grid]\ndata.max_train = [8, 8]\n",
            "",
            "data.max_train in grid must have each value once",
        ),
        ("[grid]\ndata.max_train = 8\n", "", "data.max_train in grid must be a list"),
        ("[grid]\nseed = [1]\n", "", "grid must not have seed"),
        ("[grid]\nclient.lr = [-1.0]\n", "", "client.lr must be at least 0, got -1.0"),
        ("[tables]\nx = 1\n", "", "study must have the keys .* got tables"),
        ('[[method]]\nrecipe = "tiny/fedavg"\n', "", "got fedavg twice"),
        (
            '[[method]]\nname = "again"\nrecipe = "tiny/fedavg"\n',
            "",
            "got fedavg and again with the same",
        ),
        (
            '[[method]]\nrecipe = "tiny/nothing"\n',
            "",
            "recipe of nothing must be a file|tiny/nothing",
        ),
        (
            '[[method]]\nname = "x"\nrecipe = "tiny/fedavg"\nset = {{ strategy.holdout = 0.5 }}\n',
            "",
            r"strategy.holdout must come with orchard .*\(method x\)",
        ),
        ("[tuning]\nseeds = [1]\nvalidation_size = 8\n", "", "tuning.grid must name options"),
        (
            "[tuning]\nseeds = [1]\ngrid = {{ client.lr = [1e-3] }}\n",
            "",
            "tuning.validation_size must be above 0, got None",
        ),
        (
            '[tuning]\nseeds = [1]\nmetric = "chrf"\nvalidation_size = 8\n'
            "grid = {{ client.lr = [1e-3] }}\n",
            "",
            "tuning.metric must be of evaluation.metrics, got chrf",
        ),
    ],
)
def test_a_study_that_cannot_be_is_one_clear_line(
    extra: str, without: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        read_design(write(tmp_path, extra=extra, without=without))
    assert "\n" not in str(caught.value)


def test_a_reference_must_be_a_method(tmp_path: Path) -> None:
    path = write(tmp_path, extra=KEPT)
    path.write_text(path.read_text().replace('reference = "fedavg"', 'reference = "flex"'))
    with pytest.raises(ValueError, match=r"^reference must be of fedavg, kept, got flex; "):
        read_design(path)


def test_data_that_does_not_fit_is_refused_before_any_weight_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("orchard.models.stored.loading.load_base")
    design = read_design(write(tmp_path, extra=TUNING.replace("= 8", "= 4000.0")))
    with pytest.raises(ValueError, match=r"\(method fedavg\)"):
        check_study(design)


def test_methods_are_compared_on_the_tests_of_others_too(tmp_path: Path) -> None:
    path = write(tmp_path, extra=KEPT)
    text = path.read_text().replace("[set]", "[set]\nevaluation.other_clients = 7")
    path.write_text(text)
    rows = {(row.method, row.metric): row for row in rows_of(path, tmp_path / "out")}
    assert {metric for _, metric in rows} == {"loss", "others_loss"}
    own, others = rows["kept", "loss"], rows["kept", "others_loss"]
    assert others.interval is not None
    assert others.mean != own.mean
    reference = rows["fedavg", "others_loss"]
    assert others.interval.mean == pytest.approx(others.mean - reference.mean, abs=0.2)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## others_loss" in page
    # The mean over 7 rows of other clients, by client, is what each row scored.
    from orchard.client.scores import read_scores

    for folder in (tmp_path / "out" / "runs").iterdir():
        result = json.loads((folder / "result.json").read_text())
        for client, value in result["metrics"]["personal"]["others_loss"].items():
            scores = read_scores(
                folder / "clients" / client, round_number=2, model="personal", of="others"
            )
            assert scores is not None
            assert len(scores["loss"]) == 7
            assert sum(scores["loss"]) / sum(scores["num_tokens"]) == pytest.approx(value)


STUDIES = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.toml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_that_come_with_orchard_can_be_read(path: Path) -> None:
    if "[[method]]" not in path.read_text():
        pytest.skip("no study: what a study is made of")
    design = read_design(path, ["model.path=orchard:tiny", "data.path=rows.jsonl"])
    assert len(design.seeds) >= 3
    assert design.title
