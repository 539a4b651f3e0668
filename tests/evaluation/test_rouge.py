from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchard.evaluation.rouge import Summary, chrf, exact_match, rouge_l, summarize


def test_rouge_l_by_hand() -> None:
    # "police the gunman" is common: precision and recall are 3/4, and so is F1. The stemmer makes
    # "killed" and "kill" the same, but not "killer".
    # "the cat" is common: precision 1, recall 2/6, F1 = 2 * 1/3 / (4/3) = 1/2.
    scores = rouge_l(
        ["police kill the gunman", "police kill the gunman", "the cat", "nothing shared", ""],
        [
            "police killer the gunman",
            "police killed the gunman",
            "the cat sat on the mat",
            "other words",
            "reference",
        ],
    )
    assert scores == pytest.approx([3 / 4, 1, 1 / 2, 0, 0])


def test_rouge_l_stems_and_leaves_case_and_punctuation_out() -> None:
    assert rouge_l(["He was RUNNING, quickly!"], ["he was run quickly"]) == [1.0]


def test_rouge_l_is_the_order_of_words_not_their_set() -> None:
    # All words are common, but any two of them stand the other way round.
    assert rouge_l(["alpha beta gamma"], ["gamma beta alpha"]) == pytest.approx([1 / 3])


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("für über", "fär äber", 0.0),
        ("für über", "für über", 1.0),
        ("naïve café", "naive cafe", 0.0),
        ("сегодня хорошая погода", "сегодня плохая погода", 2 / 3),
        ("مرحبا بالعالم", "مرحبا بالعالم", 1.0),
        ("今天天气很好", "今天天气不好", 5 / 6),
        ("今天 天气 很 好", "今天 天气 不 好", 3 / 4),  # segmented: words, not characters
        ("今天天气很好", "今天 天气 很 好", 1.0),  # one of them is not, so characters in both
        ("the cats sat", "the cat sat", 1.0),
    ],
)
def test_rouge_l_scores_words_of_any_script(prediction: str, reference: str, score: float) -> None:
    assert rouge_l([prediction], [reference]) == pytest.approx([score])


@pytest.mark.parametrize("score", [rouge_l, chrf])
def test_a_reference_without_a_word_is_scored_by_what_it_has(
    score: Callable[[list[str], list[str]], list[float]],
) -> None:
    # An emoji, a sign, nothing: against itself 1, against anything else 0.
    assert score(["👍", "?", "", " "], ["👍", "?", "", ""]) == [1.0, 1.0, 1.0, 1.0]
    assert score(["!", "", "a", "👍"], ["👍", "?", "", "a word"]) == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("score", [rouge_l, chrf, exact_match])
def test_an_accent_is_the_same_in_its_letter_and_behind_it(
    score: Callable[[list[str], list[str]], list[float]],
) -> None:
    composed = "Ünïcödé ね が 각"
    taken_apart = unicodedata.normalize("NFD", composed)
    assert taken_apart != composed
    assert score([composed, taken_apart], [taken_apart, composed]) == [1.0, 1.0]


def test_chrf_is_that_of_sacrebleu_for_each_example() -> None:
    from sacrebleu.metrics.chrf import CHRF

    pairs = [("the cat sat", "the cats sat down"), ("今天天气很好", "今天天气不好"), ("x", "y")]
    predictions, references = zip(*pairs, strict=True)
    expected = [CHRF().sentence_score(p, [r]).score / 100 for p, r in pairs]
    assert chrf(predictions, references) == pytest.approx(expected)
    assert 0 < expected[1] < 1


words = st.lists(st.sampled_from(["a", "b", "the", "cat", "sat"]), min_size=1, max_size=8)


@settings(deadline=None)
@given(words, words)
def test_rouge_l_is_symmetric_and_within_bounds(left: list[str], right: list[str]) -> None:
    forth, back, same = rouge_l(
        [" ".join(left), " ".join(right), " ".join(left)],
        [" ".join(right), " ".join(left), " ".join(left)],
    )
    assert 0 <= forth <= 1
    assert forth == pytest.approx(back)
    assert same == 1


def test_nothing_to_score_is_no_score() -> None:
    assert rouge_l([], []) == []


def test_exact_match_strips_unless_told_otherwise() -> None:
    assert exact_match([" 42\n", "Yes", "no"], ["42", "yes", "yes"]) == [True, False, False]
    assert exact_match(["Yes"], ["yes"], normalize=str.casefold) == [True]
    assert exact_match([" 42"], ["42"], normalize=str.casefold) == [False]


def test_every_prediction_needs_a_reference() -> None:
    message = r"predictions must be as many as references \(1\), got 2"
    with pytest.raises(ValueError, match=message):
        rouge_l(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=message):
        exact_match(["a", "b"], ["a"])


def test_a_summary_by_hand() -> None:
    values = {"x": 1.0, "y": 3.0, "z": 8.0}
    # Deviations from 4 are -3, -1 and 4; their mean square is 26 / 3.
    score = summarize(values, higher_is_better=True)
    assert score.mean == pytest.approx(4)
    assert score.worst == 1
    assert score.spread == pytest.approx(math.sqrt(26 / 3))
    assert summarize(values, higher_is_better=False).worst == 8


def test_one_client_has_no_spread() -> None:
    assert summarize({"x": 0.25}, higher_is_better=True) == Summary(0.25, 0.25, 0.0)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.floats(-1e6, 1e6), min_size=1), st.data())
def test_the_order_of_clients_does_not_matter(
    values: dict[str, float], data: st.DataObject
) -> None:
    shuffled = dict(data.draw(st.permutations(list(values.items()))))
    for higher_is_better in (True, False):
        assert summarize(values, higher_is_better=higher_is_better) == summarize(
            shuffled, higher_is_better=higher_is_better
        )


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_a_client_that_diverged_is_not_hidden(higher_is_better: bool) -> None:
    summary = summarize({"x": 1.0, "y": math.nan}, higher_is_better=higher_is_better)
    assert all(map(math.isnan, (summary.mean, summary.worst, summary.spread)))


def test_an_infinite_loss_is_the_worst() -> None:
    summary = summarize({"x": 1.0, "y": math.inf}, higher_is_better=False)
    assert (summary.mean, summary.worst) == (math.inf, math.inf)
    assert math.isnan(summary.spread)


def test_there_must_be_a_client_to_summarize() -> None:
    with pytest.raises(ValueError, match="values must hold at least one client"):
        summarize({}, higher_is_better=True)
