from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchard import demo
from orchard.data import world
from orchard.demo import conclude, summarize_methods


def result(base: float, own: float, uplink: int) -> dict[str, Any]:
    def metrics(value: float) -> dict[str, dict[str, float]]:
        return {
            "exact_match": {"a": value, "b": value},
            "retention_exact_match": {"a": 1.0, "b": 0.9},
        }

    return {
        "clients": {"a": {}, "b": {}},
        "uplink_bytes_per_round": [uplink, uplink],
        "metrics": {
            "base": metrics(base),
            "global": metrics(own),
            "local": metrics(0.0),
            "personal": metrics(own),
        },
    }


def test_the_summary_has_what_a_reader_of_it_expects() -> None:
    results = {
        "local": result(0.1, 0.5, 40),
        "fedavg": result(0.1, 0.4, 400),
        "flex": result(0.1, 0.7, 400),
    }
    summary = summarize_methods(results)
    assert list(summary) == ["base", "local", "fedavg", "flex"]
    assert summary["flex"]["exact_match"] == 0.7
    assert summary["base"]["exact_match"] == 0.1
    assert summary["fedavg"]["facts_retained"] == 0.95
    assert summary["fedavg"]["uplink_bytes_per_round"] == 200


def test_the_sentence_says_what_was_seen_whichever_way_it_went() -> None:
    def methods(flex: float) -> dict[str, dict[str, float]]:
        scores = {"flex": flex, "fedavg": 0.5, "local": 0.6}
        return {name: {"exact_match": s, "facts_retained": 1.0} for name, s in scores.items()}

    assert "30.0 points more than the averaged" in conclude(methods(0.8))
    assert "20.0 points more than training alone" in conclude(methods(0.8))
    assert "10.0 points fewer than the averaged" in conclude(methods(0.4))
    assert "as many as training alone" in conclude(methods(0.6))


def test_offices_answer_the_same_instructions_differently() -> None:
    by_office = {
        office.name: {e.instruction: e.response for e in (*office.train, *office.test)}
        for office in world.offices(0)
    }
    greetings = {name: answers.get("Greet Mila") for name, answers in by_office.items()}
    assert len(set(greetings.values())) == 4
    second = [
        {q: a for q, a in answers.items() if q.startswith("Second of")}
        for answers in by_office.values()
    ]
    shared = second[0].keys() & second[1].keys() & second[2].keys() & second[3].keys()
    assert len(shared) == 10  # the common test split
    assert all(len({answers[q] for answers in second}) == 1 for q in shared)


def test_what_is_tested_never_trains_anywhere() -> None:
    for seed in range(3):
        offices = world.offices(seed)
        for office in offices:
            trained = {e.instruction for e in office.train}
            assert len(trained) == len(office.train) == 160
            assert len(office.test) == 80
            assert not trained & {e.instruction for e in office.test}
        skills = {e.instruction for o in offices for e in o.train if e.category in world.NEW_SKILLS}
        tested = {e.instruction for e in offices[0].test if e.category in world.NEW_SKILLS}
        assert not skills & tested
        assert len(skills) == 4 * 4 * 20  # no two offices hold the same example


def test_the_world_repeats_with_its_seed_and_changes_with_it() -> None:
    assert world.offices(1) == world.offices(1) != world.offices(2)
    assert world.facts() == world.facts()
    assert len({fact.instruction for fact in world.facts()}) == 100


def test_the_base_is_never_taught_the_new_skills() -> None:
    stream = world.pretraining_stream(world.WORLD.generator("test"))
    taught = [next(stream).instruction for _ in range(3000)]
    starts = ("Second of", "Ends of", "Rest of", "Double the last")
    assert not any(text.startswith(starts) for text in taught)
    assert sum(text.startswith("Greet ") for text in taught) > 50


def test_the_demo_ends_with_three_answers_and_how_to_ask_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about: dict[str, Any] = {"versions": {}, "commit": "", "hardware": {}, "data_digest": ""}
    own = {**result(0.1, 0.5, 40), **about, "recipe_digest": ""}
    monkeypatch.setattr(demo, "prepare_experiment", lambda recipe: None)
    monkeypatch.setattr(demo, "run_experiment", lambda experiment, **options: own)
    monkeypatch.setattr(demo, "_draw", lambda folder: "")
    monkeypatch.setattr(demo, "make_console", lambda: Console(file=said, width=400))
    answers = {"the base": "one", "averaged": "two", "its own": "three"}
    said, asked = io.StringIO(), list[tuple[str, str]]()

    def side_by_side(folder: Path, question: str, *, client: str) -> dict[str, str]:
        asked.append((question, client))
        return answers

    monkeypatch.setattr(demo, "side_by_side", side_by_side)
    demo.run_demo(tmp_path / "a demo", seed=0)
    ((question, client),) = asked
    lines = said.getvalue().strip().splitlines()
    shown = [f"Asked: {question}", *(f"  {name}: {text}" for name, text in answers.items())]
    assert lines[-6:-2] == shown
    assert question.startswith("Greet ")
    assert f"orchard chat '{tmp_path / 'a demo' / 'flex'}' --client {client}" in lines[-1]
