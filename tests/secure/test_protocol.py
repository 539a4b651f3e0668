"""The sum of masked vectors is their sum, and whoever asks for more is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orchard.secure.collector import TooFewError
from orchard.secure.fixed_point import Vector
from orchard.secure.member import Member
from orchard.secure.rules import BrokenRuleError, Rules, default_threshold
from secure_sums import Sum, make_sum

LENGTH = 257


def vectors_of(names: Any, length: int = LENGTH) -> dict[str, Vector]:
    generator = np.random.default_rng(0)
    return {name: generator.integers(0, 1000, length).astype(np.uint32) for name in names}


@pytest.mark.parametrize("number", [3, 10, pytest.param(50, marks=pytest.mark.long)])
def test_the_sum_of_masked_vectors_is_the_sum(number: int) -> None:
    one = make_sum(number, LENGTH)
    one.begin()
    vectors = vectors_of(one.members)
    one.send(vectors)
    assert (one.end() == sum(vectors.values())).all()


def test_a_masked_vector_looks_like_uniform_numbers() -> None:
    length = 20_000
    one = make_sum(3, length)
    one.begin()
    sent = one.send({name: np.zeros(length, dtype=np.uint32) for name in one.members})
    for vector in sent.values():
        # Kolmogorov and Smirnov's distance from the uniform, at a level of one in a million.
        ordered = np.sort(vector.astype(np.float64) / 2**32)
        steps = np.arange(1, length + 1) / length
        distance = max(np.abs(steps - ordered).max(), np.abs(steps - 1 / length - ordered).max())
        assert distance < math.sqrt(-0.5 * math.log(1e-6 / 2) / length)
        bits = np.unpackbits(vector.view(np.uint8)).mean()
        assert abs(bits - 0.5) < 5 * 0.5 / math.sqrt(32 * length)


@pytest.mark.parametrize("when", ["before sharing", "before sending", "before the end"])
def test_members_may_leave_at_any_step(when: str) -> None:
    one = make_sum(10, LENGTH)
    gone = {"m01", "m05", "m09"}  # 30 %
    one.begin(silent=gone if when == "before sharing" else ())
    vectors = vectors_of(one.members)
    sending = {n: v for n, v in vectors.items() if n not in gone or when == "before the end"}
    one.send(sending)
    total = one.end([name for name in sending if name not in gone])
    assert (total == sum(sending.values())).all()


def test_below_the_threshold_there_is_no_sum() -> None:
    one = make_sum(10, LENGTH)
    assert one.rules.threshold == 7
    one.begin()
    vectors = vectors_of(one.members)
    one.send(dict(list(vectors.items())[:6]))
    with pytest.raises(TooFewError, match="members must be at least 7, got 6"):
        one.end()
    # And nobody tells a share to whoever asks nonetheless.
    with pytest.raises(BrokenRuleError, match="survivors must be at least 7 members, got 6"):
        one.members["m00"].confirm([f"m0{index}" for index in range(6)])


def test_too_few_answers_at_the_end_are_no_sum() -> None:
    one = make_sum(10, LENGTH)
    one.begin()
    one.send(vectors_of(one.members))
    with pytest.raises(TooFewError, match="answer to the end must be 7, got 6"):
        one.end([f"m0{index}" for index in range(6)])


def test_two_sums_of_the_same_vectors_have_different_masks() -> None:
    one, other = make_sum(3, LENGTH), make_sum(3, LENGTH)
    vectors = vectors_of(one.members)
    sent = []
    for each in (one, other):
        each.begin()
        sent.append(each.send(vectors))
    for name in vectors:
        assert (sent[0][name] == sent[1][name]).mean() < 0.05


def test_a_step_is_done_once() -> None:
    one = make_sum(3, LENGTH)
    one.begin()
    vectors = vectors_of(one.members)
    one.send(vectors)
    member = one.members["m00"]
    for again in (
        member.advertise,
        lambda: member.share({}),
        lambda: member.mask(one.collector.shares_for("m00"), vectors["m00"]),
    ):
        with pytest.raises(BrokenRuleError, match="must come once"):
            again()
    confirmed = {name: each.confirm([*one.members]) for name, each in one.members.items()}
    member.reveal(confirmed)
    with pytest.raises(BrokenRuleError, match="must come once"):
        member.reveal(confirmed)


def test_a_coordinator_who_tells_two_stories_gets_no_second_secret() -> None:
    one = make_sum(4, LENGTH)
    one.begin()
    one.send(vectors_of(one.members))
    everyone = [*one.members]
    stories = {name: everyone if name < "m02" else everyone[1:] for name in everyone}
    confirmed = {
        name: member.confirm(stories[name])
        for name, member in one.members.items()
        if name in stories[name]
    }
    for name, member in one.members.items():
        heard = {other: s for other, s in confirmed.items() if other in stories[name]}
        with pytest.raises(BrokenRuleError, match=r"must be signed by|must be at least 3"):
            member.reveal(heard)


def test_nobody_reveals_both_secrets_of_one_member() -> None:
    one = make_sum(10, LENGTH)
    one.begin()
    names = [name for name in one.members if name not in ("m03", "m04")]
    one.send({name: vector for name, vector in vectors_of(one.members).items() if name in names})
    confirmed = {name: one.members[name].confirm(names) for name in names}
    for name in names:
        told = one.members[name].reveal(confirmed)
        assert not told.own_masks.keys() & told.mask_keys.keys()
        assert told.own_masks.keys() == {*names}
        assert told.mask_keys.keys() == {"m03", "m04"}


def advertised(one: Sum) -> dict[str, Any]:
    return {name: member.advertise() for name, member in one.members.items()}


def test_a_coordinator_cannot_pose_as_a_member() -> None:
    one = make_sum(4, LENGTH)
    keys = advertised(one)
    stranger = Ed25519PrivateKey.generate()
    forged = Member("m03", stranger, {}, one.rules, b"\0" * 16).advertise()
    with pytest.raises(BrokenRuleError, match="what m03 says must be signed by m03"):
        one.members["m00"].share({**keys, "m03": forged})
    others = {name: own for name, own in keys.items() if name != "m03"}
    with pytest.raises(BrokenRuleError, match="members must be in the roster, got m99"):
        one.members["m01"].share({**others, "m99": dataclasses.replace(forged, name="m99")})
    with pytest.raises(BrokenRuleError, match="this member's keys must be among them"):
        one.members["m02"].share({n: k for n, k in keys.items() if n != "m02"})


def test_keys_of_an_earlier_sum_are_refused() -> None:
    one = make_sum(3, LENGTH)
    old = advertised(one)
    again = {
        name: Member(name, m._signing, m._roster, one.rules, b"\1" * 16)
        for name, m in one.members.items()
    }
    keys = {name: member.advertise() for name, member in again.items()}
    with pytest.raises(BrokenRuleError, match="what m01 says must be signed by m01"):
        again["m00"].share({**keys, "m01": old["m01"]})


@pytest.mark.parametrize(
    ("number", "rules", "words"),
    [
        (3, Rules(5, 3), "a sum must be at least 5 members, got 3"),
        (6, Rules(2, 4), "threshold must be above two thirds of 6 members, got 4"),
    ],
)
def test_members_take_no_part_in_sums_that_would_show_them(
    number: int, rules: Rules, words: str
) -> None:
    one = make_sum(number, LENGTH, least=rules.least, threshold=rules.threshold)
    keys = advertised(one)
    with pytest.raises(BrokenRuleError, match=words):
        one.members["m00"].share(keys)


def test_changed_shares_are_noticed_on_both_sides() -> None:
    one = make_sum(3, LENGTH)
    one.begin()
    shares = one.collector.shares_for("m00")
    changed = {**shares, "m01": shares["m01"][:-1] + bytes([shares["m01"][-1] ^ 1])}
    with pytest.raises(ValueError, match="sealed shares must be as they were sent"):
        one.members["m00"].mask(changed, vectors_of(["m00"])["m00"])

    two = make_sum(3, LENGTH)
    two.begin()
    two.send(vectors_of(two.members))
    survivors = two.collector.survivors()
    confirmed = {name: member.confirm(survivors) for name, member in two.members.items()}
    revealed = [member.reveal(confirmed) for member in two.members.values()]
    wrong = dataclasses.replace(revealed[0], own_masks=revealed[0].own_masks | {"m02": bytes(66)})
    with pytest.raises(ValueError, match="shares of m02"):
        two.collector.unmask([wrong, *revealed[1:]])


@pytest.mark.parametrize("vector", [np.zeros(3, np.uint32), np.zeros(LENGTH, np.float64)])
def test_vectors_of_another_form_are_refused(vector: Any) -> None:
    one = make_sum(3, LENGTH)
    one.begin()
    with pytest.raises(ValueError, match="vector of m00 must be 257 numbers of 32 bits"):
        one.collector.add("m00", vector)
    with pytest.raises(ValueError, match="must come once from each member, got another of m77"):
        one.collector.add("m77", vector)


@pytest.mark.parametrize("number", [2, 3, 4, 9, 50])
def test_two_groups_cannot_both_reach_the_threshold(number: int) -> None:
    threshold = default_threshold(number)
    # A member answers once: two groups of a threshold each would share more than a third, and
    # those who are hostile are at most what is not needed for one.
    assert threshold <= number
    assert 3 * threshold > 2 * number
