"""README's results are what the studies found, and nothing beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies import picture, results
from benchmarks.studies.questions import Figure, Question, read_questions
from benchmarks.studies.wording import as_sentence, beside_paper
from made_studies import METHODS, METRICS, write_study

ROOT = Path(__file__).parent.parent.parent
ASKED = Question("Many rows", "many", asks="Who wins?", design="Dolly", by="loss", paper="A paper")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    marks = "<!-- made from the results: results -->\n<!-- end of results -->\n"
    (tmp_path / "README.md").write_text(f"# Title\n\n{marks}\nProse.\n")
    return tmp_path


def asked(folder: Path, **changes: Any) -> Question:
    write_study(folder, **changes)
    return replace(ASKED, record=json.loads((folder / "study.json").read_text()))


def row(**changes: Any) -> dict[str, Any]:
    difference = {"mean": 0.02, "low": 0.01, "high": 0.03, "p": 0.001}
    own = {"method": "flex", "metric": "rouge_l", "verdict": "better", "difference": difference}
    return own | changes


def test_what_is_committed_is_what_the_results_make() -> None:
    stale = [str(path.relative_to(ROOT)) for path in results.stale()]
    assert not stale, "stale; run python scripts/make_results.py"


def test_every_committed_study_says_where_each_of_its_runs_comes_from() -> None:
    for question in read_questions():
        for column in question.record["columns"] if question.record else ():
            for run in column["runs"]:
                assert run["recipe_digest"]
                assert run["data_digest"]


def test_a_study_that_was_not_run_says_so(root: Path) -> None:
    figure = Figure("flex", "rouge_l", 43.13)
    written = results.write(root, [replace(ASKED, figures=(figure,))])
    assert written == [root / "README.md", root / "docs" / "results.md"]
    assert "| Dolly | loss | not run |" in (root / "README.md").read_text()
    assert "svg" not in (root / "README.md").read_text()
    page = (root / "docs" / "results.md").read_text()
    assert "Ours: not run (`many`)." in page
    assert "| flex | rouge_l |  | 43.13 |" in page
    assert results.stale(root, [ASKED]) == [root / "docs" / "results.md"]


def test_a_row_for_each_combination_and_the_picture_of_it(root: Path) -> None:
    question = asked(root / "study")
    assert len(results.write(root, [question])) == 3
    assert results.stale(root, [question]) == []
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\nProse.\n")
    assert text.count("benchmarks/studies/results/many/report.md) (18 of 20 runs) | loss") == 2
    assert "| fedavg 0.143 ± 0.010 | flex -0.0200 [-0.0500, +0.0000] |" in text
    page = (root / "docs" / "results.md").read_text()
    assert all(page.count(f"**{metric}, ") == 2 for metric in METRICS)
    svg = (root / "docs" / "pictures" / "results.svg").read_text()
    assert svg.count("Dolly, max_train") >= 2
    assert "prefers-color-scheme: dark" in svg
    # A name is text, also in a picture.
    assert "<img" not in svg
    assert METHODS[2].replace("<", "&lt;").replace(">", "&gt;") in svg
    changed = asked(root / "other", num_done=20)
    changed.record["rows"][1]["difference"]["mean"] = -0.9  # type: ignore[index]
    assert len(results.stale(root, [changed])) == 3


def test_colors_of_the_dark_scheme_are_those_that_are_drawn(root: Path) -> None:
    svg = picture.draw(picture.panels([asked(root / "study")]))
    style, _, drawn = svg.partition("</style>")
    for color in ("#1f2328", "#fefefe"):
        assert f'[fill="{color}"]' in style
        assert f'"{color}"' in drawn


def test_expert_load_is_shown_beside_the_base_of_each_run() -> None:
    def counted(seed: int, personal: float) -> dict[str, Any]:
        models = {"base": {"deviation": 100.0}, "personal": {"deviation": personal}}
        return {"method": "flex", "seed": seed, "commit": "c0ffee", "models": models}

    page = results.results_page([replace(ASKED, loads=(counted(0, 50.0), counted(1, 70.0)))])
    assert "| any | base | 100.00 | 1.0000 ± 0.0000 | 2 |" in page
    assert "| flex | personal | 60.00 | 0.6000 ± 0.1414 | 2 |" in page
    assert "not run" not in page.partition("## Many rows")[2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "in the paper's direction, and as large as the paper's may be"),
        (
            {"verdict": "better, not after Holm"},
            "in the paper's direction, but not after the correction, and as large",
        ),
        (
            {"difference": {"mean": 0.002, "low": 0.001, "high": 0.003}},
            "in the paper's direction, and of another size than the paper's",
        ),
        (
            {"verdict": "worse", "difference": {"mean": -0.02, "low": -0.03, "high": -0.01}},
            "the opposite of the paper's",
        ),
        (
            {"verdict": "no difference seen", "difference": {"mean": 0, "low": -0.1, "high": 0.1}},
            "no difference seen, and the paper's is not ruled out",
        ),
        (
            {"verdict": "no difference seen", "difference": {"mean": 0, "low": -0.1, "high": 0.01}},
            "no difference seen, and the paper's is ruled out",
        ),
    ],
)
def test_what_is_said_beside_a_paper_follows_from_the_interval(
    changes: dict[str, Any], said: str
) -> None:
    figures = [Figure("fedavg", "rouge_l", 41.17), Figure("flex", "rouge_l", 43.13)]
    [sentence] = beside_paper([row(**changes)], figures, "fedavg")
    assert sentence.startswith("The paper has flex at +1.96 to fedavg; here it is ")
    assert said in sentence


def test_a_paper_without_the_reference_or_of_another_base_is_not_compared() -> None:
    figures = [Figure("fedavg", "rouge_l", 41.17, model="A"), Figure("flex", "rouge_l", 43.13)]
    assert beside_paper([row()], figures, "fedavg") == []


def test_methods_are_told_apart_by_their_verdicts() -> None:
    rows = [
        row(method="fedavg", verdict="reference", difference=None),
        row(),
        row(method="local", verdict="worse, not after Holm"),
        row(method="same", verdict="no difference seen"),
    ]
    assert as_sentence(rows, "fedavg") == (
        "Better than fedavg: flex +2.00 [+1.00, +3.00]. Worse than fedavg: local +2.00 "
        "[+1.00, +3.00] (not after Holm). No difference to fedavg seen: same."
    )


def test_a_study_that_no_question_names_is_shown_too(tmp_path: Path) -> None:
    write_study(tmp_path / "results" / "own")
    found = read_questions(results=tmp_path / "results")[-1]
    assert (found.name, found.study) == ("Which is better?", "own")
    assert found.main_tables().keys() == {(cell, "loss") for cell, _ in found.tables()}


def test_a_question_with_a_wrong_key_or_a_name_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.toml"
    path.write_text('[[question]]\nname = "a"\nstudy = "a"\nask = "?"\n')
    with pytest.raises(ValueError, match="known keys, got ask"):
        read_questions(path, tmp_path)
    path.write_text('[[question]]\nname = "a"\nstudy = "a"\n' * 2)
    with pytest.raises(ValueError, match="got a twice"):
        read_questions(path, tmp_path)


def test_a_study_is_taken_over_without_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import make_results

    study, into = tmp_path / "mine", tmp_path / "results"
    write_study(study)
    (study / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must be the folder of a study.* report\.md; "):
        make_results.add(study, into)
    assert not into.exists()
    for name in ("report.md", "report.csv"):
        (study / name).write_text("made\n")
    make_results.add(study, into)
    assert sorted(path.name for path in (into / "mine").iterdir()) == sorted(make_results.KEPT)
