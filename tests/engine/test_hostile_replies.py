"""What a site answers beside its update: measurements, reasons, and who it says it is."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchard.communication.audit import read_audit
from orchard.communication.channel import Channel
from orchard.communication.readable import MAX_TEXT
from orchard.engine.evaluations import measured_ranges
from orchard.engine.exchange import Patience, Reply
from orchard.results import MetricsLog
from scripted import (
    PATIENCE,
    SITES,
    VALUES,
    Header,
    ScriptedPost,
    coordinator,
    header_of,
    metrics_of_honest,
    raw_update,
    reasons,
    run,
    update_header,
)
from sites import same

MODELS = ("base", "global")
BIG = "A" * 2_000_000
Forge = Callable[[Header], Any]


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)


def says(**facts: Any) -> Forge:
    """Answer with an honest update under a header with other facts; None takes one out."""

    def answer(asked: Header) -> Any:
        header = {**header_of("bad", asked), **facts}
        header = {key: value for key, value in header.items() if value is not ...}
        return header, raw_update(update_header(asked)) if asked["train"] else b""

    return answer


def measures(values: Any, seconds: Any = 1.0) -> Forge:
    return says(evaluation=values, evaluation_seconds=seconds)


def metric(name: str, value: Any) -> Forge:
    """Send an update that claims a metric."""

    def answer(asked: Header) -> Any:
        metrics = {"client/train_loss": 1.0, name: value}
        body = raw_update(update_header(asked, metrics=metrics)) if asked["train"] else b""
        return header_of("bad", asked), body

    return answer


FORGED: dict[str, Forge] = {
    "a value beyond every float": measures({"global/loss": 10**400}),
    "NaN": measures({"global/loss": float("nan")}),
    "NaN as text": measures({"global/loss": "NaN"}),
    "a number as text": measures({"global/loss": "1e3"}),
    "true": measures({"global/loss": True}),
    "nothing": measures({"global/loss": None}),
    "an object": measures({"global/loss": {"a": 1}}),
    "a list of values": measures([1, 2, 3]),
    "a list of pairs": measures([["global/loss", 3.0]]),
    "a text": measures("abc"),
    "an unknown metric": measures({"global/foo": 1.0, "base/foo": 1.0}),
    "a metric without a name": measures({"global/": 1.0, "base/": 1.0}),
    "a metric that was not asked for": measures({"global/accuracy": 1.0, "base/accuracy": 1.0}),
    "a model that was not asked for": measures({"personal/loss": 0.0}),
    "a local model": measures({"local/loss": 0.0}),
    "a loss whose sum overflows": measures({"global/loss": 1e308, "base/loss": 1e308}),
    "a loss below zero": measures({"global/loss": -1.0, "base/loss": -1.0}),
    "a share above one": measures({"global/rouge_l": 1.1, "base/rouge_l": 1.1}),
    "many values": measures({f"k{i}": 1.0 for i in range(20_000)}),
    "a key with a newline": measures({"global/loss\n\x1b[31m": 1.0, "base/loss\n": 1.0}),
    "seconds as text": measures({}, "x"),
    "seconds beyond every float": measures({}, 10**400),
    "seconds whose sum overflows": measures({}, 1e308),
    "seconds below zero": measures({}, -1.0),
    "no seconds": measures({}, None),
    "a reason": lambda asked: ({"refused": "x\n2026 INFO fine\x1b[2J\x1b]0;pwned\x07"}, b""),
    "a long reason": lambda asked: ({"refused": BIG}, b""),
    "a reason with half a pair": lambda asked: ({"refused": "\ud800"}, b""),
    "a reason that is none": says(refused=""),
    "a reason that is an object": lambda asked: ({"refused": {"a": 1}}, b""),
    "a reason that is 0": says(refused=0),
    "no base": says(base_digest=...),
    "a base that is none": says(base_digest=None),
    "a list of bases": says(base_digest=["base"]),
    "another base": says(base_digest="other"),
    "a long base": says(base_digest=BIG),
    "another site": says(site="a"),
    "a key more": says(more=1),
    "values that it lacks": lambda asked: ({"lacks_values": True}, b""),
    "values that it lacks not": says(lacks_values=False),
    "a list": lambda asked: Reply("", [1, 2], b""),  # type: ignore[arg-type]
    "no header": lambda asked: Reply("", None, b""),  # type: ignore[arg-type]
    "a text for a body": lambda asked: Reply("", header_of("bad", asked), "abc"),  # type: ignore[arg-type]
    "a long error": lambda asked: Reply("", error=BIG),
    "a loss in training that overflows": metric("client/train_loss", 1e308),
    "seconds of training that overflow": metric("client/train_seconds", 1e308),
    "seconds of training below zero": metric("client/train_seconds", -1e308),
    "a local metric that nobody asked for": metric("local/foo", 1.0),
    "a local loss that nobody asked for": metric("local/loss", 1.0),
    "a kind of line": metric("kind", 1.0),
    "other examples than it joined with": metric("client/num_examples", 40.0),
}


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Return what is logged meanwhile."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Keep()
    logging.getLogger("orchard").addHandler(handler)
    yield found
    logging.getLogger("orchard").removeHandler(handler)


FACTS: dict[str, Any] = {
    "num_rounds": 1,
    "models": MODELS,
    "ranges": measured_ranges(("loss", "rouge_l")),
}


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return tree and honest metrics of a run in which the bad site stays away."""
    folder = tmp_path_factory.mktemp("without")
    state, _ = run(folder, ScriptedPost(None), **FACTS)
    return state.shared, metrics_of_honest(folder)


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_answer_counts_for_nothing(
    kind: str, tmp_path: Path, lines: list[str], without: tuple[Any, Any]
) -> None:
    lines.clear()
    state, result = run(tmp_path / "run", ScriptedPost(FORGED[kind]), **FACTS)
    assert same(state.shared, without[0])
    assert metrics_of_honest(tmp_path / "run") == without[1]
    assert reasons(tmp_path / "run")
    json.dumps(result, allow_nan=False)
    events = read_audit(tmp_path / "run" / "audit.jsonl")
    for text in (*lines, *(event.get("reason", "-") for event in events)):
        assert text.isprintable()
        assert len(text) <= MAX_TEXT + 200
    assert (tmp_path / "run" / "audit.jsonl").stat().st_size < 20_000


def test_no_evaluation_takes_another_sites_seconds(tmp_path: Path) -> None:
    """The fault took the last site's seconds away, and ended the run at the second one."""
    post = ScriptedPost(measures({"base/loss": "x"}, 99.0))
    run(tmp_path / "run", post, num_rounds=1, models=MODELS)
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl").read()
    seconds = [line["seconds"] for line in log if line["kind"] == "evaluation"]
    assert seconds == [VALUES["b"]] * 2


JOINS: dict[str, Forge] = {
    "a long reason": lambda asked: {"refused": BIG},
    "a list": lambda asked: ["x"],
    "another site's name": lambda asked: {"site": "a", "num_examples": 4},
    "examples as text": lambda asked: {"site": "bad", "num_examples": "4"},
    "examples that are true": lambda asked: {"site": "bad", "num_examples": True},
    "examples beyond every number": lambda asked: {"site": "bad", "num_examples": 10**400},
    "a key more": lambda asked: {"site": "bad", "num_examples": 4, "more": 1},
}


@pytest.mark.parametrize("kind", JOINS)
def test_who_does_not_join_as_one_does_takes_no_part(kind: str, tmp_path: Path) -> None:
    patience = Patience(**{**vars(PATIENCE), "join_seconds": 0.05})
    post = ScriptedPost(says(), joins=JOINS[kind])
    run(tmp_path / "run", post, num_rounds=1, patience=patience)
    assert json.loads((tmp_path / "run" / "sites.json").read_text()) == {"a": 4, "b": 4}
    (reason,) = reasons(tmp_path / "run")
    assert len(reason) <= MAX_TEXT


def test_a_site_that_is_silent_keeps_no_other_from_joining(tmp_path: Path) -> None:
    """Who came after it was not asked until the wait for all was over."""
    post = ScriptedPost(says(), slow=lambda site, asked: site == "bad")
    looks = iter([frozenset({"bad"})] * 3)
    online = post.online
    post.online = lambda: next(looks, online())  # type: ignore[method-assign]
    patience = Patience(**{**vars(PATIENCE), "join_seconds": 0.1})
    run(tmp_path / "run", post, num_rounds=1, patience=patience)
    assert json.loads((tmp_path / "run" / "sites.json").read_text()) == {"a": 4, "b": 4}


@pytest.mark.parametrize("differences", [None, ()], ids=["whole", "differences"])
def test_a_site_that_lacks_values_and_falls_silent_keeps_no_other_waiting(
    differences: tuple[()] | None, tmp_path: Path
) -> None:
    """It alone was waited for until the round was over, and then no other had answered."""
    answered: list[float] = []

    def bad(asked: Header) -> Any:
        if asked["round"] == 1:
            return says()(asked)
        if answered:
            return None
        answered.append(time.monotonic())
        return {"lacks_values": True, "site": "bad"}, b""

    def slow(site: str, asked: Header) -> bool:
        is_there = bool(answered) and time.monotonic() > answered[0] + 0.1
        return site != "bad" and asked.get("round") == 2 and not is_there

    patience = Patience(**{**vars(PATIENCE), "round_seconds": 0.6, "poll_seconds": 0.01})
    post = ScriptedPost(bad, slow=slow, channel=Channel(differences=differences))
    state, _ = run(tmp_path / "run", post, patience=patience)
    assert state.round_number == 2
    lines = MetricsLog(tmp_path / "run" / "metrics.jsonl").read()
    assert [line["round/num_clients"] for line in lines if line["kind"] == "round"] == [3, 2]
    asked = [site for site, header in post.asked if header.get("round") == 2]
    # Who was sent all of them cannot lack any.
    assert asked.count("bad") == (1 if differences is None else 2)


def test_a_site_more_than_the_run_has_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Those that it has were waiting for an answer of another until the wait for all was over."""
    post = ScriptedPost(says(), slow=lambda site, asked: site == "bad")
    patience = Patience(**{**vars(PATIENCE), "join_seconds": 60.0})
    started = time.monotonic()
    joined = coordinator(tmp_path, patience=patience, channel=post.channel).join(post, num_sites=2)
    assert dict(joined) == {"a": 4, "b": 4}
    assert time.monotonic() - started < 30


def test_the_log_says_whom_a_join_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    post = ScriptedPost(says(), slow=lambda site, asked: site == "bad")
    patience = Patience(**{**vars(PATIENCE), "join_seconds": 0.1})
    coordinator(tmp_path, patience=patience, channel=post.channel).join(post, num_sites=3)
    said, _, begins = caplog.messages
    assert said == "2 of 3 sites joined, no answer yet of bad; waiting 0 more seconds"
    assert begins == "the run begins with 2 of 3 sites"


def test_a_site_that_comes_back_with_other_data_is_told_so(tmp_path: Path) -> None:
    more = Patience(**{**vars(PATIENCE), "quorum": 3, "join_seconds": 0.05})
    with pytest.raises(TimeoutError):
        run(tmp_path / "run", ScriptedPost(None), num_rounds=1, patience=more)
    fewer = ScriptedPost(says(), joins=lambda asked: {"site": "bad", "num_examples": 2})
    less = Patience(**{**vars(PATIENCE), "join_seconds": 0.05})
    run(tmp_path / "run", fewer, num_rounds=1, patience=less)
    assert "must have the 4 training examples" in reasons(tmp_path / "run")[-1]


def test_the_folder_of_an_older_run_is_taken_up(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sites.json").write_text(json.dumps(list(SITES)))
    state, _ = run(tmp_path / "run", ScriptedPost(says()), num_rounds=1)
    assert state.round_number == 1
    assert reasons(tmp_path / "run") == []


def test_a_log_with_a_metric_that_nobody_knows_has_a_result(tmp_path: Path) -> None:
    """Such a line was taken once, and made the result impossible, whoever took part later."""
    line = {"kind": "evaluation", "round": 0, "seconds": 1.0, "clients": {}}
    line["clients"] = {"bad": {"base/foo": 1.0, "base/loss": 2.0}}
    MetricsLog(tmp_path / "run" / "metrics.jsonl").append(line)
    _, result = run(tmp_path / "run", ScriptedPost(None), num_rounds=1, models=MODELS)
    assert result["metrics"]["base"].keys() == {"loss"}
