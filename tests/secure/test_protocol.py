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
from orchard.secure.graph import Graph, order_seed
from orchard.secure.member import Member
from orchard.secure.rules import (
    BrokenRuleError,
    Masked,
    MisbehavedError,
    Rules,
    default_threshold,
)
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
        one.members["m00"].confirm({f"m0{index}": b"" for index in range(6)})


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
        lambda: member.mask([], {}, vectors["m00"]),
    ):
        with pytest.raises(BrokenRuleError, match="must come once"):
            again()
    survivors = one.collector.survivors()
    confirmed = {name: each.confirm(survivors) for name, each in one.members.items()}
    member.reveal(confirmed)
    with pytest.raises(BrokenRuleError, match="must come once"):
        member.reveal(confirmed)


def test_a_coordinator_who_tells_two_stories_gets_no_second_secret() -> None:
    one = make_sum(4, LENGTH)
    one.begin()
    one.send(vectors_of(one.members))
    everyone = one.collector.survivors()
    fewer = {name: signature for name, signature in everyone.items() if name != "m00"}
    stories = {name: everyone if name < "m02" else fewer for name in everyone}
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
    survivors = one.collector.survivors()
    confirmed = {name: one.members[name].confirm(survivors) for name in names}
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


def test_a_share_that_was_changed_on_its_way_is_said_and_made_up_for() -> None:
    one = make_sum(10, LENGTH)
    one.begin()
    vectors = vectors_of(one.members)
    for name, member in one.members.items():
        handed = one.collector.shares_for(name)
        if name == "m00":
            sealed = handed["m01"].sealed
            wrong = sealed[:-1] + bytes([sealed[-1] ^ 1])
            handed["m01"] = dataclasses.replace(handed["m01"], sealed=wrong)
            # As it is, but not what its owner told everybody that it is.
            handed["m02"] = dataclasses.replace(handed["m02"], digests=(bytes(32), bytes(32)))
        masked = member.mask(one.collector.sharing, handed, vectors[name])
        assert masked.unreadable == (("m01", "m02") if name == "m00" else ())
        one.collector.add(masked)
    assert one.collector.lost() == []
    assert (one.end() == sum(vectors.values())).all()


def test_whose_shares_too_few_can_read_is_named() -> None:
    one = make_sum(4, LENGTH)
    one.begin()
    vectors = vectors_of(one.members)
    for name, member in one.members.items():
        handed = one.collector.shares_for(name)
        if name in ("m00", "m01"):
            handed["m02"] = dataclasses.replace(handed["m02"], sealed=bytes(160))
        one.collector.add(member.mask(one.collector.sharing, handed, vectors[name]))
    assert one.collector.lost() == ["m02"]


def test_who_tells_another_share_at_the_end_is_named_and_left_out() -> None:
    one = make_sum(4, LENGTH)
    one.begin()
    vectors = vectors_of(one.members)
    one.send(vectors)
    survivors = one.collector.survivors()
    confirmed = {name: member.confirm(survivors) for name, member in one.members.items()}
    revealed = {name: member.reveal(confirmed) for name, member in one.members.items()}
    wrong = dataclasses.replace(
        revealed["m00"], own_masks=revealed["m00"].own_masks | {"m02": bytes(66)}
    )
    strange = dataclasses.replace(
        revealed["m00"], mask_keys=revealed["m00"].mask_keys | {"m02": bytes(66)}
    )
    for bad, words in ((wrong, "shares of m02 must be as they were sent"), (strange, "it holds")):
        with pytest.raises(MisbehavedError, match=words) as caught:
            one.collector.take_revealed(bad)
        assert caught.value.name == "m00"
    with pytest.raises(MisbehavedError, match="must be told by survivors, got m77's") as caught:
        one.collector.take_revealed(dataclasses.replace(revealed["m00"], name="m77"))
    # The others are enough without it.
    total = one.collector.unmask([revealed[name] for name in ("m01", "m02", "m03")])
    assert (total == sum(vectors.values())).all()


def test_who_shared_another_secret_than_it_is_known_by_is_named() -> None:
    one = make_sum(3, LENGTH)
    keys = {name: member.advertise() for name, member in one.members.items()}
    one.collector.take_advertisements(keys)
    one.members["m02"]._own_mask = bytes(32)
    one.collector.take_shares({name: member.share(keys) for name, member in one.members.items()})
    one.send(vectors_of(one.members))
    with pytest.raises(MisbehavedError, match="shares of m02 must give back its mask") as caught:
        one.end()
    assert caught.value.name == "m02"


def test_senders_and_receivers_of_shares_are_members() -> None:
    one = make_sum(3, LENGTH)
    keys = {name: member.advertise() for name, member in one.members.items()}
    one.collector.take_advertisements(keys)
    shared = {name: member.share(keys) for name, member in one.members.items()}
    own = shared["m01"]
    stranger = dataclasses.replace(own, sealed={**own.sealed, "m77": bytes(160)})
    fewer = dataclasses.replace(own, sealed={"m00": own.sealed["m00"]})
    digests = dataclasses.replace(own, digests={"m00": own.digests["m00"]})
    for bad in (stranger, fewer, digests, dataclasses.replace(own, name="m02")):
        with pytest.raises(MisbehavedError, match="m01") as caught:
            one.collector.take_shares({**shared, "m01": bad})
        assert caught.value.name == "m01"
    with pytest.raises(MisbehavedError, match="must be of members of this sum, got m77's"):
        one.collector.take_shares({**shared, "m77": dataclasses.replace(own, name="m77")})


@pytest.mark.parametrize("key", [bytes(32), b"\1" + bytes(31), b"short"])
def test_a_key_that_agrees_with_everybody_is_refused_on_both_sides(key: bytes) -> None:
    one = make_sum(3, LENGTH)
    keys = {name: member.advertise() for name, member in one.members.items()}
    weak = dataclasses.replace(keys["m01"], mask_key=key, signature=b"")
    signature = one.members["m01"]._signing.sign(weak.signed(one.members["m01"]._session))
    keys["m01"] = dataclasses.replace(weak, signature=signature)
    with pytest.raises(MisbehavedError, match="keys of m01 must be public keys of X25519"):
        one.collector.take_advertisements(keys)
    with pytest.raises(ValueError, match="keys of m01 must be public keys of X25519"):
        one.members["m00"].share(keys)


def test_members_who_were_told_of_different_sharers_confirm_nothing() -> None:
    one = make_sum(7, LENGTH)
    one.begin()
    vectors = vectors_of(one.members)
    for name, member in one.members.items():
        handed, sharing = one.collector.shares_for(name), [*one.collector.sharing]
        if name == "m00":
            sharing.remove("m06")
            del handed["m06"]
        one.collector.add(member.mask(sharing, handed, vectors[name]))
    survivors = one.collector.survivors()
    for name, member in one.members.items():
        words = "must be members who shared" if name == "m00" else "what m00 says must be signed"
        with pytest.raises(BrokenRuleError, match=words):
            member.confirm(survivors)


@pytest.mark.parametrize("vector", [np.zeros(3, np.uint32), np.zeros(LENGTH, np.float64)])
def test_vectors_of_another_form_are_refused(vector: Any) -> None:
    one = make_sum(3, LENGTH)
    one.begin()
    with pytest.raises(MisbehavedError, match="vector of m00 must be 257 numbers of 32 bits"):
        one.collector.add(Masked("m00", vector, b""))
    with pytest.raises(MisbehavedError, match="once from each member, got another of m77"):
        one.collector.add(Masked("m77", vector, b""))
    strange = Masked("m00", np.zeros(LENGTH, np.uint32), b"", unreadable=("m77",))
    with pytest.raises(MisbehavedError, match="must be its neighbors, got others"):
        one.collector.add(strange)


@pytest.mark.parametrize("number", [2, 3, 4, 9, 50])
def test_two_groups_cannot_both_reach_the_threshold(number: int) -> None:
    threshold = default_threshold(number)
    # A member answers once: two groups of a threshold each would share more than a third, and
    # those who are hostile are at most what is not needed for one.
    assert threshold <= number
    assert 3 * threshold > 2 * number


@pytest.mark.parametrize(
    ("number", "num_neighbors"), [(9, 4), pytest.param(50, 24, marks=pytest.mark.long)]
)
def test_members_who_mask_with_neighbors_have_the_same_sum(number: int, num_neighbors: int) -> None:
    one = make_sum(number, LENGTH, num_neighbors=num_neighbors)
    one.begin()
    vectors = vectors_of(one.members)
    one.send(vectors)
    graph = one.collector.graph
    assert {len(graph.neighbors(name)) for name in one.members} == {num_neighbors}
    assert all(
        name in graph.neighbors(other) for name in vectors for other in graph.neighbors(name)
    )
    assert (one.end() == sum(vectors.values())).all()


@pytest.mark.long
def test_30_percent_of_50_members_with_neighbors_may_leave() -> None:
    one = make_sum(50, LENGTH, num_neighbors=24)
    assert one.rules.threshold == 34
    one.begin()
    graph, vectors = one.collector.graph, vectors_of(one.members)
    draws = np.random.default_rng(0)
    for _ in range(20):  # that it is enough for every neighborhood is likely, not certain
        gone = {f"m{index:02}" for index in draws.choice(50, 15, replace=False)}
        left = vectors.keys() - gone
        if all(len(graph.holders(name) & left) >= graph.threshold(one.rules) for name in vectors):
            break
    sending = {name: vector for name, vector in vectors.items() if name not in gone}
    one.send(sending)
    assert (one.end() == sum(sending.values())).all()


def test_a_neighborhood_of_whom_too_few_are_left_has_no_sum_and_shows_nothing() -> None:
    one = make_sum(12, LENGTH, num_neighbors=4)
    one.begin()
    graph, vectors = one.collector.graph, vectors_of(one.members)
    # Of five who hold a member's shares three must answer; enough of all members do.
    gone = {*sorted(graph.neighbors("m00"))[:3]}
    one.send({name: vector for name, vector in vectors.items() if name not in gone})
    with pytest.raises(TooFewError, match=r"shares of m.. must be at least 3, got 2"):
        one.end()


def test_survivors_who_share_no_masks_are_two_sums_and_are_refused() -> None:
    one = make_sum(9, LENGTH, num_neighbors=2)
    one.begin()
    graph, vectors = one.collector.graph, vectors_of(one.members)
    cut = sorted(graph.neighbors("m00"))
    sending = {name: vector for name, vector in vectors.items() if name not in cut}
    one.send(sending)
    with pytest.raises(TooFewError, match="hang together by masks"):
        one.collector.survivors()
    signed = dict(one.collector._signatures)
    for name in signed:
        with pytest.raises(BrokenRuleError, match="hang together by masks"):
            one.members[name].confirm(signed)


def test_an_order_of_members_depends_on_all_their_keys_and_the_session() -> None:
    names, keys = frozenset(map(str, range(20))), [b"a", b"b"]
    orders = [
        Graph(names, 4, order_seed(session, own)).neighbors("3")
        for session, own in ((b"1", keys), (b"1", keys[::-1]), (b"2", keys), (b"1", [b"a", b"c"]))
    ]
    assert orders[0] == orders[1]
    assert len({*orders}) == 3


@pytest.mark.parametrize(("least", "num_neighbors"), [(2, 3), (2, -2), (6, 4)])
def test_neighbors_that_hide_nobody_are_refused(least: int, num_neighbors: int) -> None:
    with pytest.raises(ValueError, match="neighbors must be 0 or an even number"):
        Rules(least, 3, num_neighbors)
