"""What is measured of serving: whose keys are there, and what stands for what is not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from orchard import measurements
from orchard.measurements import serving_peer
from orchard.measurements.serving import bench_serving
from orchard.measurements.serving_load import load_server


def test_without_the_extra_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchard.extras._is_installed", lambda name: name != "fastapi")
    with pytest.raises(ValueError, match="fastapi must be installed to measure a server"):
        measurements.run_bench("serve", as_json=True, repeats=1)


def test_a_peer_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_peer, "_NEEDS", ("openai", "no_such_package"))
    found = serving_peer.beside_transformers(
        "orchard:tiny", repeats=1, seconds=0.1, say=lambda line: None
    )
    assert found["over_transformers_serve"] is None
    assert "no_such_package must be installed" in found["why_none"]


def test_a_peer_that_does_not_come_up_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def fails(command: object, port: int) -> Iterator[str]:
        raise RuntimeError(f"a server must come up, got: {type(command).__name__}")
        yield ""

    monkeypatch.setattr("orchard.measurements.serving_process._listening", fails)
    found = serving_peer.beside_transformers(
        "orchard:tiny", repeats=1, seconds=0.1, say=lambda line: None
    )
    assert found["over_transformers_serve"] is None
    assert "a server must come up, got: list" in found["why_none"]


@pytest.mark.long
def test_a_server_under_load_answers_without_an_error() -> None:
    found = load_server("orchard:tiny", num_models=2, seconds=1.0)
    assert found["errors"] == 0
    assert found["load_answers"] >= 50
    assert 0 < found["p50_first_token_seconds"] <= found["p99_first_token_seconds"]
    assert found["p50_between_tokens_seconds"] <= found["p99_between_tokens_seconds"]


@pytest.mark.exhaustive
def test_every_key_of_serve_is_measured() -> None:
    found = bench_serving(repeats=1, model="orchard:tiny", say=lambda line: None, seconds=1.2)
    for key in (
        *("mixed_over_sequential", "mixed_over_single", "memory_8_over_1", "memory_100_over_1"),
        *("p50_first_token_seconds", "p99_first_token_seconds", "over_transformers_serve"),
        *("p50_between_tokens_seconds", "p99_between_tokens_seconds"),
    ):
        assert math.isfinite(found[key])
        assert found[key] > 0
    assert found["errors"] == 0
    assert found["same_greedy_texts"] == 8
