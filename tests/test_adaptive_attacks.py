"""Attackers that adapt do what they say, and a short run of the benchmark ends in a result."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.adaptive_attacks import run as bench
from benchmarks.adaptive_attacks.attacks import (
    ADAPTIVE,
    attacked,
    displaced,
    expert_of,
    inner,
    mean_of,
)
from orchard.communication.messages import Update

NAMES = ("layers.0.experts.0.up", "layers.0.experts.1.up", "layers.0.router.0")


def updates(first: int, number: int) -> list[Update]:
    generator = torch.Generator().manual_seed(first)
    return [
        Update(
            f"c{first + i}",
            1,
            {name: 1 + 0.3 * torch.randn(4, generator=generator) for name in NAMES},
            dict.fromkeys(NAMES, 10.0),
        )
        for i in range(number)
    ]


@pytest.mark.parametrize("attack", ADAPTIVE)
@pytest.mark.parametrize("rule", bench.RULES)
def test_an_attacker_that_adapts_does_at_least_what_it_does_at_each_strength(
    attack: str, rule: str
) -> None:
    honest, own = updates(0, 8), updates(50, 2)
    combine = partial(bench.aggregate, rule=rule)
    sent, strength = attacked(attack, honest, own, combine)
    assert strength > 0
    assert len(sent) == 2
    made = combine([*honest, *sent])
    assert made.keys() == set(NAMES)
    if attack == "inner_product":
        clean = mean_of(honest)
        assert inner(made, clean) <= inner(clean, clean)


def test_distances_are_in_honest_standard_deviations() -> None:
    honest = updates(0, 8)
    assert max(displaced(mean_of(honest), honest).values()) == pytest.approx(0, abs=1e-5)
    one = displaced(dict(honest[0].delta), honest)
    assert 0.1 < min(one.values()) <= max(one.values()) < 5
    assert [expert_of(name) for name in NAMES] == [NAMES[0][:-3], NAMES[1][:-3], ""]


@pytest.mark.long
def test_a_short_run_measures_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    federation = bench.Federation(tmp_path, seed=0, is_backdoored=False)
    clean, hit = (federation.run(attack, "mean_unbounded") for attack in ("none", "scaled"))
    assert hit["worst_distance"] > clean["worst_distance"] + 1
    assert hit["names_moved"] > clean["names_moved"]
