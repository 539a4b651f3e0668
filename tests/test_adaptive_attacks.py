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
    gain_of,
    kind_of,
    mean_of,
    moved,
    sent_at,
    strengths_of,
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
    assert len(sent) == 2
    gains = {}
    for tried in strengths_of(attack):
        made = combine([*honest, *sent_at(attack, tried, honest, own)])
        assert made.keys() == set(NAMES)
        gains[tried] = gain_of(attack, made, honest, own)
    assert len(gains) >= 5
    assert gain_of(attack, combine([*honest, *sent]), honest, own) == max(gains.values())
    assert gains[strength] == max(gains.values())


def test_a_share_of_what_moved_is_of_what_the_same_round_trained() -> None:
    """The fault was more than 100 % of the experts, where the last round trained fewer."""
    first = {NAMES[0]: 2.0, NAMES[1]: 3.0, NAMES[2]: 0.5}
    found = moved([first, {NAMES[0]: 2.5, NAMES[2]: 0.1}])
    assert found["experts_moved"] == 1.0
    assert found["names_moved"] == pytest.approx(3 / 5)
    assert found["experts"] == {NAMES[0][:-3]: 2.5, NAMES[1][:-3]: 3.0}
    assert found["kinds"] == {"experts": 3.0, "routers": 0.5}
    assert (found["worst_name"], found["worst_distance"]) == (NAMES[1], 3.0)
    assert [kind_of(name) for name in (*NAMES[1:], "layers.0.self_attn.q_proj.lora_A")] == [
        *("experts", "routers", "attention")
    ]


def test_the_bounds_are_those_between_sites() -> None:
    """A rule was attacked without the share of weight times norm that a site counts for."""
    honest = [
        Update(f"c{i}", 1, {"layers.0.q": torch.ones(4)}, {"layers.0.q": 10.0}) for i in range(8)
    ]
    bad = Update("c8", 1, {"layers.0.q": torch.full((4,), 9.0)}, {"layers.0.q": 1000.0})
    made = bench.aggregate([*honest, bad], rule="mean")["layers.0.q"]
    # Counted for 30 examples, and by its norm for a ninth of them.
    expected = (8 * 10 * 1.0 + 30 / 9 * 9.0) / (8 * 10 + 30 / 9)
    assert made.tolist() == pytest.approx([expected] * 4)
    equal = bench.aggregate([*honest, bad], rule="mean_equal")["layers.0.q"]
    assert equal.tolist() == pytest.approx([(8 + 3 / 9 * 9) / (8 + 3 / 9)] * 4)
    free = bench.aggregate([*honest, bad], rule="mean_unbounded")["layers.0.q"]
    assert free.tolist() == pytest.approx([(80 + 9000) / 1080] * 4)


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
