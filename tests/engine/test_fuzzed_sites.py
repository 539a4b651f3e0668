"""Two sites of five answer whatever chance makes of a valid answer; nobody else may notice.

A case is bytes, from which ``mutations.py`` takes its choices. What a case found that was wrong is
kept below as a case of its own.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mutations import Chance, header_text, update_message
from orchard.communication import door
from orchard.communication.audit import read_audit
from orchard.communication.channel import Channel, Codec
from orchard.communication.quantization import Int8
from orchard.communication.readable import MAX_TEXT, readable
from orchard.communication.sparsification import TopK
from orchard.communication.stages import Cast
from orchard.engine.exchange import Reply
from orchard.results import MetricsLog
from orchard.server.optimizers import Adaptive
from orchard.server.robust import RobustSettings, robust_aggregate
from orchard.strategies.strategy import Strategy
from orchard.trees import Tree, digest
from scripted import (
    BAD,
    EXAMPLES,
    FIRST,
    SHARED,
    TWO_BAD,
    Header,
    ScriptedPost,
    header_of,
    honest,
    metrics_of_honest,
    run,
    update_header,
)

MODELS = ("base", "global", "local")
# Of a line of a log: a reason, and what we say around it.
LONGEST_LINE = MAX_TEXT + 300
MOST_GROWTH_KIB = 100_000


class Noted(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Noted]:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # ten thousand runs, and none is kept
    handler, logger = Noted(), logging.getLogger("orchard")
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    yield handler
    logger.removeHandler(handler)
    logger.propagate = propagated


@dataclass(frozen=True)
class Outcome:
    """What is left of a run.

    Attributes:
        shared: Digest of the global tree.
        counted: Whether an update of a hostile site is in it.
        honest: What the log holds of the honest sites.
        tree: The global tree.
    """

    shared: str
    counted: bool
    honest: str
    tree: Tree


CHANNELS = (
    Channel(),
    Channel(uplink=(Cast(torch.bfloat16),)),
    Channel(uplink=(Int8(),)),
    Channel(uplink=(TopK(0.5),)),
    Channel(uplink=(TopK(0.5), Int8())),
)
# No honest site trains this expert.
WITH_EXPERT = {**SHARED, "layers.0.experts.1.up_proj.lora_A": torch.zeros(2, 2)}
STRATEGIES = (
    Strategy(),
    Strategy(optimizer=Adaptive("adam", lr=0.1)),
    Strategy(aggregate=robust_aggregate(RobustSettings("clipped_mean"))),
    Strategy(aggregate=robust_aggregate(RobustSettings("krum"))),
)


# What does not depend on a case is made once.
@cache
def honest_message(kind: int, site: str, round_number: int) -> bytes:
    return CHANNELS[kind].pack_update(honest(site, round_number))


@cache
def honest_tensors(kind: int, site: str) -> Tree:
    return Codec(CHANNELS[kind].uplink).encode(honest(site, shared=WITH_EXPERT).delta)


def answers(chance: Chance, kind: int, site: str) -> Any:
    """Return how a site answers, as Flower's post would hand it over."""
    sent = honest_tensors(kind, site)

    def reply_to(asked: Header, header: Any, body: bytes) -> Reply:
        try:
            found = door.read_header_text(header_text(header, chance))
            return Reply("", found, body, error=door.read_failure(found))
        except ValueError as error:
            return Reply("", error=readable(str(error)))

    def answer(asked: Header) -> Reply:
        body = b""
        if asked["train"]:
            header = update_header(asked, site, shared=WITH_EXPERT)
            body = update_message(header, sent, chance, names=tuple(WITH_EXPERT))
        return reply_to(asked, header_of(site, asked), body)

    return answer


def outcome(content: bytes, *, is_undisturbed: bool = False) -> Outcome:
    """Run a federation with what a case makes of it; undisturbed where the bad sites stay away.

    Of four cases one is of two sites that do the same.
    """
    chance = Chance(content)
    kind, strategy = chance.below(len(CHANNELS)), chance.one_of(STRATEGIES)
    folder = Path(tempfile.mkdtemp(prefix="orchard-fuzz-", dir=_memory()))
    try:
        post = ScriptedPost(
            None,
            channel=CHANNELS[kind],
            shared=WITH_EXPERT,
            sites=TWO_BAD,
            message=partial(honest_message, kind),
        )
        if not is_undisturbed:
            other = Chance(content[2:]) if chance.below(4) == 3 else chance
            other.below(4)
            post.bad, post.worse = answers(chance, kind, "bad"), answers(other, kind, "worse")
        state, result = run(folder, post, num_rounds=1, models=MODELS, strategy=strategy)
        json.dumps(result, allow_nan=False)
        lines = MetricsLog(folder / "metrics.jsonl").read()
        counted = any(line.get("client") in BAD for line in lines if line["kind"] == "client")
        for event in read_audit(folder / "audit.jsonl"):
            text = str(event.get("reason", ""))
            assert len(text) <= MAX_TEXT
            assert text.isprintable() or not text
        assert (folder / "audit.jsonl").stat().st_size < 20_000
        rows = json.dumps(metrics_of_honest(folder), sort_keys=True)
        return Outcome(digest(state.shared), counted, rows, state.shared)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@cache
def undisturbed(kind: bytes) -> Outcome:
    return outcome(kind, is_undisturbed=True)


def check(content: bytes, noted: Noted) -> None:
    first = Chance(content)
    kind = bytes((first.below(len(CHANNELS)), first.below(len(STRATEGIES))))
    expected = undisturbed(kind)
    noted.lines.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = outcome(content)
    assert found.honest == expected.honest
    if not found.counted:
        assert found.shared == expected.shared
    # What was let in is bounded: at most ten times the median norm, and its own share of the mean.
    longest = 10 * float(torch.cat([t.flatten() for t in honest("b").delta.values()]).norm())
    for tensor in found.tree.values():
        assert torch.isfinite(tensor).all()
        assert float(tensor.abs().max()) <= longest
    for line in noted.lines:
        assert len(line) <= LONGEST_LINE
        assert line.isprintable()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_GROWTH_KIB


FEW = settings(
    max_examples=100,  # of two sites each
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FEW
@given(content=st.binary(min_size=8, max_size=72))
@example(content=b"")
def test_nobody_notices_what_two_sites_answer(content: bytes, noted: Noted) -> None:
    check(content, noted)


@pytest.mark.long
@settings(FEW, max_examples=600, derandomize=False)
@given(content=st.binary(min_size=8, max_size=72))
def test_nobody_notices_whatever_two_sites_answer(content: bytes, noted: Noted) -> None:
    check(content, noted)


@pytest.mark.exhaustive
@settings(FEW, max_examples=10_000, derandomize=False)
@given(content=st.binary(min_size=8, max_size=72))
def test_nobody_notices_what_two_sites_answer_for_minutes(content: bytes, noted: Noted) -> None:
    check(content, noted)


def test_the_cases_are_not_all_of_one_kind(noted: Noted) -> None:
    """A fuzzer whose every case is refused, or let in, would show nothing."""
    generator = random.Random(0)
    found = [outcome(generator.randbytes(32)) for _ in range(60)]
    assert 6 <= sum(own.counted for own in found) <= 54
    assert len(set(noted.lines)) >= 30


def test_an_answer_that_chance_leaves_alone_is_an_honest_one(noted: Noted) -> None:
    found = outcome(b"")
    assert found.counted
    assert float(found.tree[FIRST][0, 0]) == pytest.approx((1 + 2 + 3 + 1.5 + 2.5) / 5)
    assert EXAMPLES == 4
    assert len(TWO_BAD) == 5
